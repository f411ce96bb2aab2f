#!/bin/sh
# The SuperLink: the sites dial in here. Its state is in superlink.db and survives a restart.
set -eu
umask 077
cd "$(dirname "$0")"
export PATH=@{bin}:"$PATH" FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flower-superlink \
  --database superlink.db \
  --isolation process --superexec-auth-secret-file superexec.secret \
  --serverappio-api-address @{appio} \
  --control-api-address @{control} \
  --fleet-api-address @{fleet} \
  --health-server-address @{superlink_health} \
  @{security} \
  "$@@"
