"""A stand-in for ssh on the PATH: it runs the command here, after ssh's own manner."""

from __future__ import annotations

from pathlib import Path

SCRIPT = """\
#!/bin/sh
# Options first; then the host; the rest is one line for a shell there.
while [ "${{1#-}}" != "$1" ]; do
  case "$1" in -o) shift 2;; *) shift;; esac
done
host=$1; shift
echo "$host $*" >> {log}
case "$host" in
  unreachable)
    echo "ssh: connect to host unreachable port 22: No route to host" >&2; exit 255;;
  bare)
    echo "env: '/opt/python': No such file or directory" >&2; exit 127;;
esac
echo "Welcome to $host"
# No exec: like ssh, this process may die without the command noticing at once.
env -i HOME="$HOME" PATH=/usr/bin:/bin {prefix} sh -c "{before}$*"
"""


def write_fake_ssh(folder: Path, *, prefix: str = "", before: str = "") -> Path:
    """Write the script; return the folder for the PATH. `log` beside it lists the calls.

    Args:
        folder: where `bin/ssh` and `ssh.log` shall be.
        prefix: a command that runs the shell of the other machine.
        before: what that shell does first.
    """
    script = folder / "bin" / "ssh"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.format(log=folder / "ssh.log", prefix=prefix, before=before))
    script.chmod(0o755)
    return script.parent
