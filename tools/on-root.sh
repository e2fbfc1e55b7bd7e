#!/bin/bash
# chroot.sh runs this script in the system that it has made. Arguments: those of chroot.sh after the suite.
set -euo pipefail
cd "$(dirname "$0")/.."
R --version | head -n 1
rustc --version
library=/tmp/library
mkdir "$library"
R CMD INSTALL --library="$library" . >/tmp/install.log 2>&1 || { cat /tmp/install.log; exit 1; }
export R_LIBS=$library

check() {
  (cd /tmp && R CMD build "$OLDPWD" >build.log 2>&1) || { cat /tmp/build.log; return 1; }
  (cd /tmp && _R_CHECK_FORCE_SUGGESTS_=false _R_CHECK_CRAN_INCOMING_REMOTE_=false \
    R CMD check --as-cran --no-manual --no-tests rustcluster_*.tar.gz) || true
  Rscript --vanilla tools/check-notes.R /tmp/rustcluster.Rcheck/00check.log
}

status=0
tests=()
for what in "$@"; do
  case $what in
    build | check) ;;
    *) tests+=("$what") ;;
  esac
done
if [ ${#tests[@]} != 0 ]; then
  [ "${tests[0]}" != tests ] || tests=()
  Rscript tools/run-tests.R /tmp/summary "${tests[@]}" || status=1
fi
case " $* " in
  *" check "*) check || status=1 ;;
esac
if [ -e /tmp/summary ]; then cat /tmp/summary; fi
exit $status
