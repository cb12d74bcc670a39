# The environments of scripts/demo, scripts/lab and scripts/test; sourced by them, with $root set to the checkout.

# A Python that can run m3jax and make environments. A name that exists may still not run, so each is tried.
find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3.14 python3; do
    if "$name" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "No Python of 3.11 or later with venv and pip was found: install one (Debian, Ubuntu: python3 and python3-venv)." >&2
  return 1
}

# install ENVIRONMENT NAME PIP_ARGUMENT...
# Makes the environment where it is missing, then runs `pip install`, unless both were done for this pyproject.toml.
install() {
  local environment=$1 name=$2 python stamp wanted
  shift 2
  # M3JAX_LOCKED=1 takes the versions in constraints/, whatever has been published since.
  if [[ -n ${M3JAX_LOCKED:-} && -f $root/constraints/$name.txt ]]; then
    set -- --constraint "$root/constraints/$name.txt" "$@"
  fi
  stamp=$environment/.installed-$name
  # With the path: an environment that has been moved points to where it was.
  wanted=$({ printf '%s\n' "$environment" "$@" && cat "$root/pyproject.toml"; } | cksum)
  if [[ -x $environment/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || return
    echo "Making $environment with $python" >&2
    "$python" -m venv --clear "$environment" || return
  fi
  echo "Installing $name into $environment (once, it may take minutes)" >&2
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || return
  printf '%s\n' "$wanted" >"$stamp"
}
