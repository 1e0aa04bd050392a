#!/bin/sh
# keep_ptxas_log.sh NVCC ARGUMENT...: runs it. What ptxas says of registers, stack and spills goes
# beside the object file, to OBJECT.ptxas.txt, for the tests that read it; the rest is shown.
previous=
for argument; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
log=$object.ptxas.txt
"$@" 2> "$log"
status=$?
grep -v -e '^ptxas info' -e '^ *[0-9]* bytes stack frame' "$log" >&2
exit $status
