#!/bin/sh
# The services of colotx's test guest that are more than one command. Each talks on its standard input and output.

case $1 in
sink)
    # Tells the MD5 of each 16 KiB that came, and at the end of the rest.
    empty=$(md5sum </dev/null)
    while sum=$(dd bs=16k count=1 iflag=fullblock 2>/dev/null | md5sum) && [ "$sum" != "$empty" ]; do
        echo "${sum%% *}"
    done
    ;;
clock)
    # Answers each line with the nanoseconds this guest has run, of which no two guests think the same.
    while read -r _; do
        { read -r _ && read -r _ && read -r _ _ now _; } </proc/timer_list
        printf '%36s\n' "$now"
    done
    ;;
numbers)
    while cat /numbers; do :; done
    ;;
esac
