#!/bin/sh
# This site's SuperNode. It dials out to the server; nothing listens but on this machine's own
# address. After MAX_RETRIES failed connections in a row it gives up with a message. One that ends
# by an error is started again after RESTART_S seconds, RESTARTS times in a row: the server refuses
# a site that has crashed until it counts as offline, which takes up to a minute.
set -u
umask 077
cd "$(dirname "$0")" || exit 1
# bin/ first: its flwr-clientapp runs the installed package, never code that a server has sent.
export PATH="$PWD/bin":@{bin}:"$PATH" FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
# gRPC would ask a proxy even for this machine's own address.
export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"
ended=no supernode= failures=0
end() {
  ended=yes
  kill $supernode 2>/dev/null
}
trap end INT TERM HUP
while :; do
  started=$(date +%s)
  flower-supernode \
    --superlink @{superlink} \
    @{security} \
    --node-config node.toml \
    --clientappio-api-address 127.0.0.1:0 \
    --health-server-address @{health} \
    --max-retries "${MAX_RETRIES:-30}" \
    "$@@" &
  supernode=$!
  wait $supernode
  status=$?
  if [ $ended = yes ]; then
    wait
    exit 0
  fi
  [ $status = 0 ] && exit 0
  # One that has run for long was no failed start.
  [ $(($(date +%s) - started)) -gt 600 ] && failures=0
  failures=$((failures + 1))
  [ $failures -gt "${RESTARTS:-5}" ] && break
  echo "start-supernode.sh: the SuperNode ended with status $status," \
    "starting it again in ${RESTART_S:-20} s ($failures of ${RESTARTS:-5})" >&2
  sleep "${RESTART_S:-20}" &
  wait $!
  [ $ended = yes ] && exit 0
done
echo "start-supernode.sh: the SuperNode ended with status $status; the lines above say why" >&2
exit $status
