#!/bin/sh
# systemd.generator(7): what the devices of the machine files add to the units.
exec /usr/bin/bulkhead unit generate "$1"
