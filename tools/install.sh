# Sourced by check, demo.sh and test.sh: finds the tools that they need, or installs them on Debian and Ubuntu.

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "needed: $*  (as root, or install sudo)" >&2
    exit 1
  fi
}

# Installs Debian packages that are not installed yet.
need_packages() {
  local missing=()
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  if ! command -v apt-get >/dev/null; then
    echo "needed, and not to be installed without apt-get: ${missing[*]}" >&2
    exit 1
  fi
  echo "installing ${missing[*]}"
  as_root apt-get update -q >/dev/null
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    "${missing[@]}" >/dev/null
}

# Finds or installs a Rust toolchain that is new enough: the installed one, or Debian's rustc-web, or rustc.
# With the argument "lints", clippy and rustfmt, too.
need_rust() {
  if ! (use_rust) >/dev/null 2>&1; then
    if apt-cache show rustc-web >/dev/null 2>&1; then
      need_packages rustc-web cargo-web
    else
      need_packages rustc cargo
    fi
  fi
  use_rust
  if [ "${1:-}" = lints ] && ! { cargo clippy --version && cargo fmt --version; } >/dev/null 2>&1; then
    if command -v rustup >/dev/null; then
      rustup component add clippy rustfmt
    elif dpkg-query -W rustc-web >/dev/null 2>&1; then
      need_packages rust-web-clippy rustfmt-web
    else
      need_packages rust-clippy rustfmt
    fi
  fi
}

# Puts the toolchain that configure finds on the PATH. Fails without one.
use_rust() {
  PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
  Rscript --vanilla tools/msrv.R
  local dir
  dir=$(Rscript --vanilla -e 'source("tools/rust.R"); cat(find_rust()$dir)')
  if [ -n "$dir" ]; then PATH="$dir:$PATH"; fi
  export PATH
}
