#!/bin/sh
# The rest of the guest's life as PID 1: a line that comes through the port is a mark and a command. What the command
# prints goes back, its errors go to the console, then a line of the mark and its exit status. Powers off at the end.
#
#     agent.sh REPOSITORY
export HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
cd "$1" || exit 1
until test -c /dev/vport*; do
    sleep 0.05
done
exec 3<>"$(echo /dev/vport*)"
echo up >&3
while read -r mark command <&3; do
    sh -c "$command" </dev/null >&3 3>&-
    printf '\n%s %d\n' "$mark" $? >&3
done
echo o >/proc/sysrq-trigger
while :; do
    sleep 1
done
