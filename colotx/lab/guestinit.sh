#!/bin/sh
# PID 1 of colotx's test guest: one NIC, a few TCP services, and a memory check that never stops.
# Settings come from the kernel command line as colotx.NAME=VALUE.

export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=90% run /run

address='' address6='' pattern=0 pause=100 firsttcp=1
for word in $(cat /proc/cmdline); do
    case $word in
    colotx.address=*) address=${word#*=} ;;
    colotx.address6=*) address6=${word#*=} ;;
    colotx.pattern=*) pattern=${word#*=} ;;
    colotx.pause=*) pause=${word#*=} ;;
    colotx.firsttcp=*) firsttcp=${word#*=} ;;
    esac
done

while read -r module; do insmod "/modules/$module"; done </modules/order

ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
    ip link set eth0 up
    [ -n "$address" ] && ip addr add "$address" dev eth0
    [ -n "$address6" ] && ip addr add "$address6" dev eth0
fi

publish() {
    echo "$1 $2" >/run/verdict.new
    mv /run/verdict.new /run/verdict
    echo "colotx: $1 $2"
}

# 509 is prime, so pages of the file differ from their neighbours, and every page from its content a round before.
content() {
    yes "$(printf '%-508d' "$1")" | dd bs=4096 count=$((pattern / 4096)) iflag=fullblock 2>/dev/null
}

publish 0 ok
nc -ll -p 7 -e cat &
nc -ll -p 9 -e sh /services sink &
nc -ll -p 13 -e sh /services clock &
nc -ll -p 19 -e sh /services numbers &
nc -ll -p 1001 -e cat /run/verdict &

# The line of the last listener: the address any, its port in hexadecimal, the state LISTEN.
until grep -q ':03E9 0*:0000 0A' /proc/net/tcp6; do usleep 20000; done
# The guest's first TCP connection fixes the offset of its TCP time stamps, and the secret of its sequence numbers.
[ "$firsttcp" = 0 ] || until nc 127.0.0.1 1001 </dev/null >/dev/null 2>&1; do usleep 20000; done
echo "colotx: ready after $(cut -d ' ' -f 1 /proc/uptime) s"

[ "$pattern" -gt 0 ] || while :; do sleep 1000; done

round=0 verdict=ok
content 0 >/run/pattern
while :; do
    usleep "${pause}000"
    [ "$(content "$round" | md5sum)" = "$(md5sum </run/pattern)" ] || verdict=CORRUPT
    round=$((round + 1))
    content "$round" 1<>/run/pattern
    publish "$round" "$verdict"
done
