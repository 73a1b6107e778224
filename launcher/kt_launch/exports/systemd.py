"""A systemd unit. systemd restarts it after a crash, unless its exit code says that it would fail the same way."""

from __future__ import annotations

import re

from kt_launch.exports import Launch

PLAIN = re.compile(r"[\w@+=:,./\[\]-]+")
UNIT = """\
# /etc/systemd/system/kt-launch-{label}.service
#   systemctl daemon-reload && systemctl enable --now kt-launch-{label}
# Exit codes 2, 3 and 4 are a configuration error, a server that does not start, a failed proof: no restart.
# It is up once it is proven; kt-launch itself gives up on a server that does not start (server.start_timeout_s).
[Unit]
Description=kt-launch serving {description}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=15min
StartLimitBurst=5

[Service]
Type=notify
TimeoutStartSec=infinity
User={user}
ExecStart={command}
{secrets}Environment=KT_LAUNCH_RUNS=/var/lib/kt-launch/runs KT_LAUNCH_CACHE=/var/cache/kt-launch PYTHONUNBUFFERED=1
StateDirectory=kt-launch
CacheDirectory=kt-launch
Restart=on-failure
RestartSec=5s
RestartPreventExitStatus=2 3 4
SuccessExitStatus=130
KillMode=mixed
TimeoutStopSec=60s
LimitNOFILE=65536
NoNewPrivileges=yes

[Install]
WantedBy=multi-user.target
"""
SECRETS = """\
# Holds {names}; readable by root only.
EnvironmentFile=/etc/kt-launch/{label}.env
"""


def write(launch: Launch) -> str:
    command = [launch.python, "-P", "-m", "kt_launch.cli", *launch.words()]
    names = ", ".join(f"{name}=…" for name in launch.secrets)
    return UNIT.format(
        label=launch.label,
        description=launch.name.replace("%", "%%"),
        user=launch.user,
        command=" \\\n    ".join(quote(word) for word in command),
        secrets=SECRETS.format(names=names, label=launch.label) if launch.secrets else "",
    )


def quote(word: str) -> str:
    """One word of ExecStart: % starts a specifier and $ a variable, quotes and backslashes are its own."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if PLAIN.fullmatch(word) else f'"{escaped}"'
