#!/bin/sh
# Makes the directory of a server or of a site in its volume, at the first start only.
#
#   fedllm-setup server            /server, for the names in SERVER_HOSTS
#   fedllm-setup site NAME         /site, for the one file in /data and the server SERVER
#   fedllm-setup admit             registers the sites' keys at the running server
#
# SECURITY is "tls" or "insecure". What the two sides have to tell each other, ca.crt and the
# sites' public keys, goes through /exchange.
set -eu
die() {
  echo "error: $*" >&2
  exit 1
}
is_made() { # directory
  [ -e "$1/README.md" ] || return 1
  if [ -e "$1/ca.crt" ]; then found=tls; else found=insecure; fi
  [ "$found" = "$SECURITY" ] || die "the volume of $1 holds a federation with SECURITY=$found;" \
    "go on with that one, or remove the volumes: docker compose down --volumes"
  echo "$1 is there already."
}
server() {
  if ! is_made /server; then
    set -- /server --private-host "$PRIVATE_HOST"
    for host in $SERVER_HOSTS; do set -- "$@" --host "$host"; done
    [ "$SECURITY" = tls ] || set -- "$@" --insecure
    fedllm server init "$@"
  fi
  if [ "$SECURITY" = tls ]; then cp /server/ca.crt /exchange/; fi
}
site() { # name
  name="$1"
  is_made /site || make_site
  if [ "$SECURITY" = tls ]; then cp "/site/$name.pub" /exchange/; fi
}
make_site() {
  set -- /data/*
  [ $# = 1 ] && [ -e "$1" ] || die "/data of $name: give a directory that holds one file of records"
  # shellcheck disable=SC2086 # SITE_OPTIONS are several words
  set -- /site --name "$name" --data "$1" --server "$SERVER" --health-port 9096 \
    --approval automatic ${SITE_OPTIONS:-}
  if [ "$SECURITY" = tls ]; then set -- "$@" --ca /exchange/ca.crt; else set -- "$@" --insecure; fi
  fedllm site init "$@"
}
admit() {
  for key in /exchange/*.pub; do
    [ -e "/server/site-keys/${key##*/}" ] || fedllm server register /server "$key"
  done
}
case "${SECURITY:-}" in tls | insecure) ;; *) die "SECURITY=${SECURITY:-}: give tls or insecure" ;; esac
case "${1:-}" in
  server) server ;;
  site) site "${2:?give the name of the site}" ;;
  admit) admit ;;
  *) die "fedllm-setup ${1:-}: give server, site or admit" ;;
esac
