"""Settings: one truth in two places, and a misspelt key never passes in silence."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from refocus import settings
from refocus.errors import SettingsError

CONFIG = Path(__file__).parent.parent / "config.toml"


def test_config_toml_shows_every_setting_with_its_default() -> None:
    shown = tomllib.loads(CONFIG.read_text())
    commented = CONFIG.read_text().replace("# [", "[").replace("\n# ", "\n")
    everything = {**tomllib.loads(commented.partition("\n\n")[2])}
    defaults = msgspec.json.decode(msgspec.json.encode(settings.Settings()))
    for section, content in defaults.items():
        if section == "channels":
            fields = msgspec.structs.fields(settings.ChannelSettings)
            assert set(everything["channels"]["DAPI"]) == {field.name for field in fields}
            continue
        assert set(everything[section]) == set(content), section
        set_here = {key: value for key, value in content.items() if value is not None}
        assert shown[section] == set_here, section


def test_config_toml_is_accepted() -> None:
    assert settings.load(CONFIG) == settings.Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[acquire]\nraw_que_mib = 1", ["raw_que_mib", "raw_queue_mib"]),
        ("[aquire]\n", ["aquire", "acquire"]),
        ("[channels.DAPI]\nemision_nm = 1", ["emision_nm", "emission_nm", "channels.DAPI"]),
        ("[engine]\nruntime = 'gpu'", ["gpu", "runtime"]),
        ("[engine]\nthreads = 'two'", ["threads"]),
        ("[acquire]\nraw_queue_mib = 0", ["raw_queue_mib", "at least 1"]),
        ("[engine]\ndevices = []", ["devices", "[]"]),
        ("[engine]\ndevices = [0, 0]", ["devices", "[0, 0]"]),
        ("[engine]\ndevices = [-1]", ["devices", "[-1]"]),
        ("engine = 3", ["engine", "section"]),
        ("[engine", ["TOML"]),
    ],
)
def test_a_wrong_setting_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.parse(text.encode(), "my.toml")
    assert caught.value.exit_code == 2
    for word in ["my.toml", *words]:
        assert word in str(caught.value)


def test_workers_on_other_hosts_may_be_the_only_ones() -> None:
    alone = settings.parse(b"[engine]\ndevices = []\n[link]\nkeys = 'keys'", "my.toml")
    assert alone.engine.devices == ()


def test_the_first_file_found_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, here, explicit = (tmp_path / name for name in ("user.toml", "config.toml", "x.toml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "user_config_path", lambda: user)
    assert settings.load() == settings.Settings()
    for number, path in enumerate((user, here, explicit), start=1):
        path.write_text(f"[engine]\nthreads = {number}")
        assert settings.load(explicit if path is explicit else None).engine.threads == number
    with pytest.raises(SettingsError, match="no file"):
        settings.load(tmp_path / "absent.toml")
