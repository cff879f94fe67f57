#!/usr/bin/env bash
# Gives the namespaces it was started in a machine's own places, then becomes "$@".
# usage: room.sh NAME KEEP... -- COMMAND...      KEEP: folders that stay, read-only; with a leading +, writable
set -euo pipefail
hostname "$1"; shift
declare -A kept
while [ "$1" != -- ]; do
  exec {fd}< "${1#+}"     # what is mounted over below can still be reached through this
  kept[$1]=$fd
  shift
done
shift

mount -t tmpfs -o mode=700 tmpfs "$HOME"
for place in /tmp /run /mnt /dev/shm; do
  mount -t tmpfs -o mode=1777 tmpfs "$place"
done
mkdir -m 755 /run/sshd
for folder in "${!kept[@]}"; do
  mkdir -p "${folder#+}"
  mount --no-canonicalize --bind "/proc/self/fd/${kept[$folder]}" "${folder#+}"
  [ "$folder" != "${folder#+}" ] || mount -o remount,bind,ro "$folder"
done
for fd in "${kept[@]}"; do exec {fd}<&-; done
mount -o remount,bind,ro /
cd "$HOME"
exec "$@"
