/*
 * Lets QEMU's COLO thread wait for a virtual CPU under software emulation.
 *
 * QEMU's COLO thread calls run_on_cpu(), which ends in pthread_cond_wait() with the big QEMU lock, without holding
 * that lock. The C library then releases the lock under whoever holds it, and QEMU hangs after a few checkpoints.
 *
 * The pthread_cond_wait() below, to be preloaded, takes the mutex if the calling thread does not hold it, and gives
 * it back when it returns. The caller may have missed its wake-up before the mutex was taken, so the wait is limited
 * to one millisecond. That is sound: callers must expect to wake for no reason, and look again at what they wait for.
 *
 * For the same reason the virtual CPU may miss that it is wanted: it was kicked without the lock, between its look at
 * its work and its wait, and sleeps until something else wakes it, which for an idle guest takes seconds. So whoever
 * waits without the lock, once it has it, wakes all who wait with it. They, too, must expect to wake for no reason.
 *
 * Who holds a mutex is read from the field glibc keeps for it, for every kind of mutex unless lock elision is on (it
 * is off unless the environment asks for it).
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

typedef int (*cond_wait)(pthread_cond_t *, pthread_mutex_t *);

static cond_wait find_original(void)
{
    /* x86 has an older function of the same name for another condition layout, which dlsym() may find first. */
    void *found = dlvsym(RTLD_NEXT, "pthread_cond_wait", "GLIBC_2.3.2");

    if (found == NULL) {
        found = dlsym(RTLD_NEXT, "pthread_cond_wait");
    }
    if (found == NULL) {
        abort();
    }
    return (cond_wait)found;
}

enum { WAITERS = 1024 }; /* the virtual CPUs of the largest guest, and some; who finds no place just waits */

static struct {
    pthread_cond_t *cond;
    pthread_mutex_t *mutex;
} waiters[WAITERS];

static pthread_mutex_t waiters_lock = PTHREAD_MUTEX_INITIALIZER;

static int enter(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
    int place = 0;

    pthread_mutex_lock(&waiters_lock);
    while (place < WAITERS && waiters[place].cond != NULL) {
        place++;
    }
    if (place < WAITERS) {
        waiters[place].cond = cond;
        waiters[place].mutex = mutex;
    }
    pthread_mutex_unlock(&waiters_lock);
    return place;
}

static void leave(int place)
{
    pthread_mutex_lock(&waiters_lock);
    if (place < WAITERS) {
        waiters[place].cond = NULL;
    }
    pthread_mutex_unlock(&waiters_lock);
}

static void wake_all(pthread_mutex_t *mutex)
{
    pthread_mutex_lock(&waiters_lock);
    for (int place = 0; place < WAITERS; place++) {
        if (waiters[place].cond != NULL && waiters[place].mutex == mutex) {
            pthread_cond_broadcast(waiters[place].cond);
        }
    }
    pthread_mutex_unlock(&waiters_lock);
}

static int wait_unowned(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
    struct timespec until;
    int error = pthread_mutex_lock(mutex);

    if (error != 0) {
        return error;
    }
    wake_all(mutex);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &until);
    return pthread_mutex_unlock(mutex);
}

int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
    static cond_wait original;
    cond_wait wait = __atomic_load_n(&original, __ATOMIC_RELAXED);
    int place, error;

    if (mutex->__data.__owner != gettid()) {
        return wait_unowned(cond, mutex);
    }
    if (wait == NULL) {
        wait = find_original();
        __atomic_store_n(&original, wait, __ATOMIC_RELAXED);
    }
    place = enter(cond, mutex);
    error = wait(cond, mutex);
    leave(place);
    return error;
}
