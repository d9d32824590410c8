# shellcheck shell=bash
# Sourced by the other scripts: makes (once) and enters the virtual environment, installs this checkout and EXTRAS.
python_bin=${PYTHON:-python3}
venv=${VENV:-.venv}
if ! "$python_bin" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed; $python_bin is $("$python_bin" --version 2>&1). Set PYTHON=..." >&2
  exit 1
fi
[ -x "$venv/bin/python" ] || "$python_bin" -m venv "$venv"
# shellcheck disable=SC1091  # made by the line above
. "$venv/bin/activate"
stamp="$venv/.installed-${EXTRAS:-core}"
if [ ! -e "$stamp" ] || [ requirements.txt -nt "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  echo "installing into $venv (once; about a minute)" >&2
  python -m pip install --quiet --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}"
  # Renders instrument notes. The package pyaudio that it names is needed to play sounds alone, and hard to build.
  python -m pip install --quiet --disable-pip-version-check --no-deps tinysoundfont==0.3.7 ||
    echo "no tinysoundfont for this Python and system: world Menagerie will have no instrument notes" >&2
  touch "$stamp"
fi
