"""All settings, their defaults and where they are read from.

Defaults live here; config.toml at the top of the repository shows every one with its reason, and a
test keeps both equal. First found wins, never merged: ``--config FILE``, ``./config.toml``, the
user's configuration folder, the defaults. Settings are read once at the start and passed down.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec
import platformdirs

from refocus.errors import SettingsError

RuntimeChoice = Literal["auto", "tensorrt", "openvino", "none"]
Modality = Literal["fluorescence", "brightfield", "phase", "none"]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class AcquireSettings(_Section, frozen=True, kw_only=True):
    """From the hook to the disk."""

    raw_queue_mib: int = 1024
    raw_stall_ms: int = 500
    refocus_slot_frames: int = 4
    drain_s: float = 10.0
    fill_at_end_s: float = 10.0


class StoreSettings(_Section, frozen=True, kw_only=True):
    """The run on disk."""

    reserve_mib: int = 2048
    """Kept free: at this a run is stopped. 0 does not stop one; one that cannot fit is refused all
    the same."""


class EngineSettings(_Section, frozen=True, kw_only=True):
    """The worker and its generator."""

    runtime: RuntimeChoice = "auto"
    generator: str = "current"
    """The one chosen with `refocus models use`, else fluorescence; or a name, or a folder."""
    devices: tuple[int, ...] = (0,)
    """GPUs, one worker each; one worker where the runtime is the CPU's. Empty: none here, only
    workers on other hosts."""
    threads: int = 0
    frame_timeout_ms: int = 10_000
    warmup_timeout_ms: int = 600_000


class LinkSettings(_Section, frozen=True, kw_only=True):
    """The wire between daemon and worker."""

    address: str = "auto"
    keys: str = ""
    """Folder of the CURVE keys; empty: only this computer's workers are let in."""
    shared_memory: bool = True
    """Pixels go to workers on this computer through shared memory, behind the same messages."""
    beat_ms: int = 250
    beats_missed: int = 4


class OpticsSettings(_Section, frozen=True, kw_only=True):
    """The objective; None is unknown, and is said so rather than guessed."""

    na: float | None = None
    immersion_index: float | None = None


class ChannelSettings(_Section, frozen=True, kw_only=True):
    """One channel by its Micro-Manager name."""

    emission_nm: float | None = None
    modality: Modality | None = None


class Settings(_Section, frozen=True, kw_only=True):
    """Everything that can be set, section by section as in config.toml."""

    acquire: AcquireSettings = AcquireSettings()
    store: StoreSettings = StoreSettings()
    engine: EngineSettings = EngineSettings()
    link: LinkSettings = LinkSettings()
    optics: OpticsSettings = OpticsSettings()
    channels: dict[str, ChannelSettings] = {}


_AT_LEAST: dict[tuple[str, str], float] = {
    ("acquire", "raw_queue_mib"): 1,
    ("acquire", "raw_stall_ms"): 0,
    ("acquire", "refocus_slot_frames"): 1,
    ("acquire", "drain_s"): 0,
    ("acquire", "fill_at_end_s"): 0,
    ("store", "reserve_mib"): 0,
    ("engine", "threads"): 0,
    ("engine", "frame_timeout_ms"): 1,
    ("engine", "warmup_timeout_ms"): 1,
    ("link", "beat_ms"): 10,
    ("link", "beats_missed"): 2,
}


def user_config_path() -> Path:
    """The config.toml in the user's own configuration folder (it need not exist)."""
    return platformdirs.user_config_path("refocus") / "config.toml"


def load(config: Path | None = None) -> Settings:
    """Settings from the first file found (see module), or the defaults where there is none.

    Raises SettingsError naming the file and the key, with the nearest known key for a misspelt one.
    """
    if config is not None and not config.is_file():
        raise SettingsError(f"--config: no file {config}")
    candidates = [config] if config is not None else [Path("config.toml"), user_config_path()]
    for path in candidates:
        if path.is_file():
            return parse(path.read_bytes(), str(path))
    return Settings()


def parse(text: bytes, origin: str) -> Settings:
    """Settings from TOML *text*; *origin* is named in errors."""
    try:
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = r"; write paths with /, or in '...': 'C:\Users\me'" if b"\\" in text else ""
        raise SettingsError(f"{origin}: not valid TOML: {error}{hint}") from error
    _refuse_unknown(table, origin)
    try:
        settings = msgspec.convert(table, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(
            f"{origin}: {error}; config.toml in the repository shows every key"
        ) from error
    for (section, key), least in _AT_LEAST.items():
        value = getattr(getattr(settings, section), key)
        if not value >= least:  # NaN, too
            raise SettingsError(
                f"{origin}: [{section}] {key} must be at least {least:g}, got {value}"
            )
    devices = settings.engine.devices
    none_here = not devices and not settings.link.keys
    if none_here or any(d < 0 for d in devices) or len(set(devices)) < len(devices):
        raise SettingsError(
            f"{origin}: [engine] devices must name each GPU once, counted from 0, as in [0, 1], or "
            f"be [] where [link] keys lets in workers on other hosts; got {list(devices)}"
        )
    return settings


def _refuse_unknown(table: dict[str, Any], origin: str) -> None:
    sections = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    for section, content in table.items():
        _known(section, list(sections), f"{origin}: unknown section [{section}]")
        if not isinstance(content, dict):
            raise SettingsError(f"{origin}: [{section}] must be a section, got {content!r}")
        if section == "channels":
            groups = [(f"channels.{name}", body, ChannelSettings) for name, body in content.items()]
        else:
            groups = [(section, content, sections[section])]
        for name, body, struct in groups:
            keys = [field.name for field in msgspec.structs.fields(struct)]
            for key in body if isinstance(body, dict) else ():
                _known(key, keys, f"{origin}: unknown key {key!r} in [{name}]")


def _known(name: str, known: list[str], complaint: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    raise SettingsError(f"{complaint}; {hint}")
