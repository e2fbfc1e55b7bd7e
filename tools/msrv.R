# Checks that there is a Rust toolchain that is new enough. Otherwise fails and says what to do.
source("tools/rust.R")
needs <- required_rust()
rust <- find_rust(needs)
if (length(rust)) {
  message("using cargo ", if (nzchar(rust$dir)) paste0("in ", rust$dir, " "), "with rustc ", rust$rustc)
} else {
  seen <- attr(rust, "seen")
  message(
    "------------------------- rustcluster: Rust is needed -------------------------\n",
    "cargo and rustc, version ", needs, " or newer, were not found",
    if (length(seen)) paste0(";\n  ", paste(seen, collapse = "\n  ")) else ".",
    "\nInstall them in one of these ways, then install rustcluster again:\n",
    "  Debian, Ubuntu:  sudo apt-get install rustc-web cargo-web\n",
    "                   (or rustc and cargo, if they are new enough)\n",
    "  Fedora:          sudo dnf install rust cargo\n",
    "  anywhere:        rustup, from https://rustup.rs\n",
    "-------------------------------------------------------------------------------"
  )
  quit(status = 1)
}
