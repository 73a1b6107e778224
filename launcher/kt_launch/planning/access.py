"""Access: API keys, and whether other machines can reach the server without one.

Keys themselves are never read here: the config says where they are, and the server's processes read them.
"""

from __future__ import annotations

import ipaddress
import re

from kt_launch.planning.draft import Draft
from kt_model.contract import OWN_ADMIN_KEY
from kt_model.flags import flags_in, is_flag, typed_flags
from kt_model.redaction import FILE_REFERENCE, REFERENCE, absolute_place

FLAGS = {"server.api_key": "--api-key", "server.admin_key": "--admin-api-key"}
DEFAULT = {"server.api_key": "KT_LAUNCH_API_KEY", "server.admin_key": "KT_LAUNCH_ADMIN_KEY"}
"""Environment variables that messages and exports suggest."""
ORIGIN = re.compile(r"https?://[^/\s*]+")


def resolve_access(draft: Draft) -> None:
    server = draft.config.server
    for key in FLAGS:
        if draft.given(key) is not None:
            _check_place(draft, key, draft.given(key))
            draft.set(key, absolute_place(draft.given(key)), draft.sources.of(key))
    _check_words(draft, server.extra_args)
    if not (is_loopback(server.host) or server.open or has_key(draft)):
        problem = f"{server.host} is open to other machines, and no key is required"
        fix = f"Set server.api_key=env:{DEFAULT['server.api_key']} and set it, or server.open=true to let everyone in."
        draft.problems.add("server.host", problem, fix)
    for origin in server.origins:
        if not ORIGIN.fullmatch(origin):
            problem = f"{origin!r} is not an origin, expected scheme, host and port as a browser sends them"
            draft.problems.add("server.origins", problem, "Set server.origins=[https://chat.example.com].")


def _check_words(draft: Draft, words: list[str]) -> None:
    """Keys given by SGLang's own flags: they must be spelled in full, so that we know that there is one, and not be
    empty, which SGLang treats as no key."""
    for flag, value in flags_in(words):
        key, meant = next(((key, known) for key, known in FLAGS.items() if is_flag(flag, known)), ("", ""))
        if meant and (flag != meant or not value.strip()):
            problem = f"{flag} is a beginning of {meant}" if flag != meant else f"{meant} is empty"
            draft.problems.add("server.extra_args", problem, f"Set {key}=env:{DEFAULT[key]}.")


def key_arguments(draft: Draft) -> list[str]:
    """SGLang's flags, with references instead of keys. Where requests need a key, routes that change the server need an
    admin key; if none is configured, the launcher makes up a random one that only it knows."""
    places = {flag: draft.value(key) if key in draft.resolved else None for key, flag in FLAGS.items()}
    admin = FLAGS["server.admin_key"]
    if has_key(draft) and places[admin] is None and admin not in typed_flags(draft.config.server.extra_args):
        places[admin] = REFERENCE + OWN_ADMIN_KEY
    return [word for flag, place in places.items() if place is not None for word in (flag, place)]


def has_key(draft: Draft) -> bool:
    """Whether requests must carry a key, including one set by SGLang's own flag."""
    server = draft.config.server
    return server.api_key is not None or FLAGS["server.api_key"] in typed_flags(server.extra_args)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_place(draft: Draft, key: str, place: str) -> None:
    """The message does not quote the value: it may be a key."""
    known = next((mark for mark in (REFERENCE, FILE_REFERENCE) if place.startswith(mark)), None)
    if known is None or place == known:
        problem = "the key itself would be recorded with the run; expected env:NAME or file:/path/to/file"
        draft.problems.add(key, problem, f"Set {key}=env:{DEFAULT[key]} and set that variable.")
