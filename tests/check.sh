#!/bin/sh
# All checks. Output of each step goes to target/check/STEP.log; the last line sums up the tests.
set -u
cd "$(dirname "$0")/.." || exit 1
target=${CARGO_TARGET_DIR:-target}
logs=$target/check
mkdir -p "$logs"
passed=0
failed=0
: >"$logs/failed"

# step NAME COMMAND...: runs the command, adds what its output counts, and one failure if it fails without any.
step() {
	name=$1
	shift
	printf '%s ... ' "$name"
	began=$(date +%s)
	"$@" >"$logs/$name.log" 2>&1
	status=$?
	# "test result: ok. 3 passed; 0 failed; ..." is cargo's, "lab result: 3 passed, 0 failed ..." the lab's and that of the units.
	counts=$(sed -nE 's/^(test|lab) result: ([a-zA-Z]+\. )?([0-9]+) passed[;,] ([0-9]+) failed.*/\3 \4/p' "$logs/$name.log" |
		awk '{ p += $1; f += $2 } END { print p + 0, f + 0 }')
	good=${counts% *}
	bad=${counts#* }
	if [ $status -ne 0 ] && [ "$bad" -eq 0 ]; then bad=1; fi
	passed=$((passed + good))
	failed=$((failed + bad))
	seconds=$(($(date +%s) - began))
	if [ "$bad" -eq 0 ]; then
		echo "ok, $good tests, $seconds s"
	else
		echo "FAILED, $seconds s; the end of $logs/$name.log:"
		tail -n 60 "$logs/$name.log" | sed 's/^/    /'
		sed -nE "s/^(test .* \.\.\. FAILED|thread '.*' .*panicked at .*)/    $name: \1/p" "$logs/$name.log" >>"$logs/failed"
	fi
}

step format cargo fmt --all --check
step lint cargo clippy --workspace --all-targets --locked -- -D warnings
step build cargo run -q -p bulkhead-lab -- build
# These need the release build.
own="--exclude bulkhead-native-tests --exclude bulkhead-qmp-tests"
# With "class: full" or "class: limited" VMs run here. The native tests need root too. Else all run in the lab.
case $(id -u):$("$target/release/bulkhead" doctor 2>/dev/null | tail -n 1) in
0:*full* | 0:*limited*) native="cargo test -p bulkhead-native-tests --locked --no-fail-fast" ;;
*)
	native="cargo run -q -p bulkhead-lab -- native --test-threads=2"
	own="$own --exclude bulkhead-core"
	;;
esac
# shellcheck disable=SC2086 # a list of options
step unit cargo test --workspace $own --locked --no-fail-fast
# shellcheck disable=SC2086 # a command
step native $native
step qmp cargo test -p bulkhead-qmp-tests --locked --no-fail-fast
step units tests/units.sh
step lab cargo run -q -p bulkhead-lab -- run

cat "$logs/failed"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
