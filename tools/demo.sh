#!/bin/bash
# Goes from a bare Debian or Ubuntu to a computation on 320 workers. Argument: the number of workers.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install.sh
need_packages r-base-core r-base-dev r-cran-cli xz-utils
need_rust
library=$(Rscript --vanilla -e '
  place <- .libPaths()[file.access(.libPaths(), 2) == 0]
  if (!length(place)) {
    place <- Sys.getenv("R_LIBS_USER")
    dir.create(place, recursive = TRUE, showWarnings = FALSE)
  }
  cat(normalizePath(place[1]))')
echo "building rustcluster and installing it into $library"
log=$(mktemp)
R CMD INSTALL --library="$library" . >"$log" 2>&1 || { cat "$log"; exit 1; }
rm -f "$log"
exec Rscript inst/examples/sir.R "$@"
