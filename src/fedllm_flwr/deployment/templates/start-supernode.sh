#!/bin/sh
# This site's SuperNode. It connects to the server, and listens only on loopback. Whenever it ends, it
# is restarted until this script is ended: after RESTART_S seconds (5), doubled each time up to
# RESTART_MAX_S (60), and reset after it has run for ten minutes. RESTARTS=3 gives up after three
# short-lived starts. The server refuses a crashed site until it is considered offline, which takes up
# to a minute. A SuperNode ends after MAX_RETRIES consecutive failed connections.
set -u
umask 077
cd "$(dirname "$0")" || exit 1
if [ -z "${LOGGED:-}" ]; then # every line gets a time, and is kept in logs/
  LOGGED=yes exec @{python} -P -m fedllm_flwr.deployment.logged logs/supernode.log \
    /bin/sh "./start-supernode.sh" "$@@"
fi
unset LOGGED
ended=no supernode= failures=0 pause=${RESTART_S:-5}
end() {
  ended=yes
  kill $supernode 2>/dev/null
}
trap end INT TERM HUP
while :; do
  started=$(date +%s)
  @{fedllm} site start "$PWD" "$@@" &
  supernode=$!
  wait $supernode
  status=$?
  if [ $ended = yes ]; then
    wait
    exit 0
  fi
  # One that has run for long was no failed start.
  [ $(($(date +%s) - started)) -gt 600 ] && failures=0 pause=${RESTART_S:-5}
  failures=$((failures + 1))
  [ -n "${RESTARTS:-}" ] && [ $failures -gt "$RESTARTS" ] && break
  echo "start-supernode.sh: the SuperNode ended with status $status," \
    "starting it again in $pause s ($failures in a row)" >&2
  sleep $pause &
  wait $!
  [ $ended = yes ] && exit 0
  pause=$((pause * 2))
  [ $pause -gt "${RESTART_MAX_S:-60}" ] && pause=${RESTART_MAX_S:-60}
done
echo "start-supernode.sh: the SuperNode ended with status $status; the lines above say why" >&2
[ $status = 0 ] && exit 1
exit $status
