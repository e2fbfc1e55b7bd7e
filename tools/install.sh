# Sourced by demo.sh and test.sh: installs what is missing on Debian and Ubuntu.

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

# Debian packages that are not installed yet.
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

# A Rust toolchain that is new enough: the one there is, or Debian's rustc-web, or rustc. Further
# arguments: packages of rustc-web's source that are wanted too.
need_rust() {
  PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
  if ! Rscript --vanilla tools/msrv.R >/dev/null 2>&1; then
    if apt-cache show rustc-web >/dev/null 2>&1; then
      need_packages rustc-web cargo-web "$@"
    else
      need_packages rustc cargo
    fi
  fi
  Rscript --vanilla tools/msrv.R
  # What configure finds in a place of its own must be found by name here, too.
  local dir
  dir=$(Rscript --vanilla -e 'source("tools/rust.R"); cat(find_rust()$dir)')
  if [ -n "$dir" ]; then PATH="$dir:$PATH"; fi
  export PATH
}
