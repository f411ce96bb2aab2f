#!/bin/sh
# This site's SuperNode. It dials out to the server; nothing listens but on this machine's own
# address. After MAX_RETRIES failed connections in a row it gives up with a message.
set -eu
umask 077
cd "$(dirname "$0")"
export PATH=@{bin}:"$PATH" FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
# gRPC would ask a proxy even for this machine's own address.
export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"
exec flower-supernode \
  --superlink @{superlink} \
  @{security} \
  --node-config node.toml \
  --clientappio-api-address 127.0.0.1:0 \
  --max-retries "${MAX_RETRIES:-30}" \
  "$@@"
