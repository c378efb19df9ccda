#!/bin/sh
# Installs what building, testing and the demonstration need on Debian 12 or later. Quick when all is there.
set -eu
PATH=$PATH:${HOME:-/root}/.cargo/bin

missing=
# need PACKAGE TEST...: adds the package unless the test succeeds.
need() {
	package=$1
	shift
	"$@" >/dev/null 2>&1 || missing="$missing $package"
}
installed() {
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}
# The lab boots this kernel and gives it to its guests; any version will do.
cloud_kernel() {
	for image in /boot/vmlinuz-*-cloud-amd64; do
		[ -r "$image" ] && [ -e "/lib/modules/${image#/boot/vmlinuz-}/modules.dep" ] && return
	done
	return 1
}
python_venv() {
	python3 -c 'import ensurepip, venv'
}
# Of Debian 12 it is part of qemu-system-common, which has no package of that name.
virtiofs_daemon() {
	[ -x /usr/lib/qemu/virtiofsd ] || [ -x /usr/libexec/virtiofsd ] || grep -q '^VERSION_ID="12"' /etc/os-release
}

need gcc command -v cc
need libc6-dev installed libc6-dev
need qemu-system-x86 command -v qemu-system-x86_64
need qemu-system-common command -v qemu-storage-daemon
need virtiofsd virtiofs_daemon
need busybox-static installed busybox-static
need linux-image-cloud-amd64 cloud_kernel
need socat command -v socat
need xz-utils command -v xz
need iproute2 command -v ip
# The lab's system with systemd is made of Debian packages.
need mmdebstrap command -v mmdebstrap
need debian-archive-keyring test -e /usr/share/keyrings/debian-archive-keyring.gpg
# Its systemd-analyze judges the units; nothing is started.
need systemd command -v systemd-analyze
need e2fsprogs test -x /sbin/mke2fs -o -x /usr/sbin/mke2fs
need python3-venv python_venv

if [ -n "$missing" ]; then
	line="apt-get install -y --no-install-recommends$missing"
	if [ "$(id -u)" = 0 ]; then
		as_root=
	elif sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null && sudo -v; }; then
		as_root=sudo
	else
		echo "setup: packages are missing and this user cannot install them; as root, run:" >&2
		echo "  apt-get update && $line" >&2
		exit 1
	fi
	echo "setup: installing$missing"
	$as_root apt-get update -q
	# shellcheck disable=SC2086 # the lists are words
	$as_root env DEBIAN_FRONTEND=noninteractive $line
fi

if ! command -v cargo >/dev/null; then
	echo "setup: no Rust toolchain: install one from https://rustup.rs" >&2
	exit 1
fi
# Only the checks need these two. rustup's minimal profile lacks them.
if ! { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1; then
	rustup component add rustfmt clippy || echo "setup: make check will fail without rustfmt and clippy" >&2
fi
