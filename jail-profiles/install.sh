#!/bin/sh
# Installs what `cargo build --release` has built, with the units, as a package would. DESTDIR goes before each path.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}/release
dest=${DESTDIR:-}
libexec=$dest/usr/libexec/bulkhead
root=$dest/usr/lib/bulkhead/root

install -D -m 755 "$target/bulkhead" "$dest/usr/bin/bulkhead"
for process in core loader dump console broker pci block net balloon mem pmem; do
	install -D -m 755 "$target/bulkhead-$process" "$libexec/bulkhead-$process"
done
install -D -m 755 jail-profiles/generator.sh "$dest/usr/lib/systemd/system-generators/bulkhead-generator"
for unit in jail-profiles/systemd/*; do
	install -D -m 644 "$unit" "$dest/usr/lib/systemd/system/${unit##*/}"
done
# Root directory of the units: nothing but places to mount on.
for dir in dev proc run/bulkhead run/credentials run/private run/systemd sys tmp \
	usr/bin usr/libexec/bulkhead var/tmp var/lib/bulkhead var/lib/private; do
	install -d -m 755 "$root/$dir"
done
for process in core loader dump console broker pci block net balloon mem pmem; do
	[ -e "$root/usr/libexec/bulkhead/bulkhead-$process" ] ||
		install -m 444 /dev/null "$root/usr/libexec/bulkhead/bulkhead-$process"
done
install -d -m 755 "$root/dev/net" "$root/run/bulkhead-vhost"
for file in dev/kvm dev/net/tun run/bulkhead/opener run/bulkhead/boot run/bulkhead/job run/systemd/notify usr/bin/bulkhead; do
	[ -e "$root/$file" ] || install -m 444 /dev/null "$root/$file"
done
install -d -m 755 "$dest/etc/bulkhead"
echo "installed; next: a machine file /etc/bulkhead/NAME.toml, then systemctl start bulkhead@NAME.target"
