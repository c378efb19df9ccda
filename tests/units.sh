#!/bin/sh
# The units as a package would install them: clean to systemd-analyze verify, exposure at most 1.0. Starts nothing.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$(mktemp -d) || exit 1
trap 'rm -rf "$root"' EXIT
DESTDIR=$root jail-profiles/install.sh >/dev/null || exit 1
# What the units refer to.
cp -R --no-preserve=ownership /lib/systemd/system/. "$root/usr/lib/systemd/system/"
mkdir -p "$root/lib"
ln -s ../usr/lib/systemd "$root/lib/systemd"
[ -e "$root/usr/bin/env" ] || cp /usr/bin/env "$root/usr/bin/env"
passed=0
failed=0

# judge NAME OUTPUT: fails if there is any output, as an unknown key only warns.
judge() {
	if [ -z "$2" ]; then
		passed=$((passed + 1))
	else
		failed=$((failed + 1))
		echo "$1: $2"
	fi
}

for unit in jail-profiles/systemd/*; do
	name=${unit##*/}
	[ -e "$root/usr/lib/systemd/system/$name" ] || continue
	instance=${name%@*}@vm1.${name##*.}
	case $name in bulkhead-block@* | bulkhead-net@* | bulkhead-balloon@* | bulkhead-mem@* | bulkhead-pmem@* | bulkhead-vhost@*)
		instance=${name%@*}@vm1-d0.${name##*.} ;;
	esac
	said=$(systemd-analyze verify --man=no --root="$root" "$instance" 2>&1) || said="verify failed: $said"
	judge "$name" "$said"
	case $name in *.service) ;; *) continue ;; esac
	# The threshold is in tenths.
	last=$(systemd-analyze security --offline=yes --no-pager --threshold=10 "$unit" 2>&1)
	status=$?
	last=$(printf '%s\n' "$last" | tail -n 1)
	echo "$last"
	said=
	[ $status -eq 0 ] || said="more than 1.0: $last"
	judge "$name" "$said"
done
echo "lab result: $passed passed, $failed failed"
[ $failed -eq 0 ]
