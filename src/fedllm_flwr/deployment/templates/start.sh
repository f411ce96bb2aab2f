#!/bin/sh
# Both parts of the server in one terminal: Ctrl-C ends them. A SuperLink that dies is started
# again and its run goes on. For a machine that boots without you, see systemd/.
set -u
here="$(cd "$(dirname "$0")" && pwd)"
ended=no superlink= superexec=
end() {
  ended=yes
  kill $superlink $superexec 2>/dev/null
}
trap end INT TERM HUP
"$here/start-superexec.sh" &
superexec=$!
status=0
for attempt in 1 2 3 4 5; do
  "$here/start-superlink.sh" &
  superlink=$!
  wait $superlink
  status=$?
  [ $ended = yes ] && break
  echo "start.sh: the SuperLink ended with status $status (start $attempt of 5)" >&2
  sleep 3
done
kill $superlink $superexec 2>/dev/null
wait
[ $ended = yes ] && exit 0
exit $status
