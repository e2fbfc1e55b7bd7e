#!/bin/sh
# Generates R/extendr-wrappers.R, NAMESPACE and man/ from the sources. With an argument, the installed package
# is left in that folder.
set -eu
cd "$(dirname "$0")/.."
R_HOME=$(R RHOME)
R_INCLUDE_DIR=$("$R_HOME/bin/R" --no-echo --no-restore -e "cat(R.home('include'))")
export R_HOME R_INCLUDE_DIR
./configure
make -s -C src -f Makevars document
src/rust/target/release/document >R/extendr-wrappers.R

# roxygen2 reads the installed package.
if [ $# = 1 ]; then
  library=$1
else
  library=$(mktemp -d)
  trap 'rm -rf "$library"' EXIT
fi
"$R_HOME/bin/R" CMD INSTALL --no-docs --no-test-load --library="$library" . >"$library/log" 2>&1 ||
  { cat "$library/log"; exit 1; }
R_LIBS="$library" "$R_HOME/bin/Rscript" -e 'roxygen2::roxygenise(load_code = "installed")'
