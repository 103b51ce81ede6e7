"""Profiles: what a load takes from them, and what they must not be used for."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama_crab import AsyncLlama, Llama, LlamaParams, ParameterError
from llama_crab.tuning import Bed, Profile, tune
from llama_crab.tuning.profile import ProfileError, build_facts, identity_of, machine_facts

SMALL = {"n_ctx": 256, "n_threads": 1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CRAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "profiles"


@pytest.fixture
def profile(tiny_path):
    return Profile(
        goal="latency",
        model=identity_of(tiny_path),
        machine=machine_facts(),
        build=build_facts(),
        params={"n_ubatch": 64, "flash_attn_type": "disabled", "n_seq_max": 2},
        model_name=tiny_path.name,
        created="2026-01-01T00:00:00+0000",
    )


def loaded(tiny_path, **fields):
    with Llama(tiny_path, **fields) as llama:
        assert llama.create_completion("a", 2).usage.completion_tokens > 0
        return llama.params


def test_a_saved_profile_is_found_by_model_and_machine(tiny_path, profile, own_cache):
    assert profile.save().parent == own_cache
    params = loaded(tiny_path, profile="auto", n_threads=1)
    assert (params.n_ubatch, params.flash_attn_type, params.n_seq_max) == (64, "disabled", 2)


def test_a_copy_of_the_model_under_another_name_is_the_same_model(tiny_path, profile, tmp_path):
    profile.save()
    copy = shutil.copy(tiny_path, tmp_path / "renamed.gguf")
    assert loaded(copy, profile="auto", **SMALL).n_ubatch == 64


def test_what_the_user_sets_wins(tiny_path, profile):
    profile.save()
    params = loaded(tiny_path, profile="auto", n_ubatch=32, n_threads=1)
    assert (params.n_ubatch, params.flash_attn_type) == (32, "disabled")


def test_room_that_the_user_sized_is_not_divided(tiny_path, profile):
    profile.save()
    assert loaded(tiny_path, profile="auto", **SMALL).n_seq_max is None


def test_fields_that_exclude_each_other_do_not_fail_the_load(tiny_path, profile):
    """The profile's n_ubatch does not fit in the user's n_batch; the rest of it does."""
    profile.save()
    params = loaded(tiny_path, profile="auto", n_batch=32, n_threads=1)
    assert (params.n_batch, params.n_ubatch, params.flash_attn_type) == (32, None, "disabled")


def test_batch_threads_of_a_profile_do_not_outlive_the_users_threads(profile):
    tuned = dataclasses.replace(profile, params={"n_threads": 1, "n_threads_batch": 2})
    assert tuned.apply(LlamaParams()).n_threads_batch == 2
    assert tuned.apply(LlamaParams(n_threads=4)).n_threads_batch is None


def test_nothing_saved_means_the_defaults_and_one_debug_line(tiny_path, caplog):
    with caplog.at_level(logging.DEBUG, logger="llama_crab.tuning"):
        params = loaded(tiny_path, profile="auto", **SMALL)
    assert params.n_ubatch is None
    lines = [record for record in caplog.records if record.name == "llama_crab.tuning"]
    assert [record.levelno for record in lines] == [logging.DEBUG]
    assert "the defaults are used" in lines[0].getMessage()


@pytest.mark.parametrize("fact", ["machine", "build"])
def test_a_profile_of_another_place_is_ignored_and_said_so(tiny_path, profile, caplog, fact):
    other = {**getattr(profile, fact), "n_threads": 999, "llama_cpp": "another"}
    path = dataclasses.replace(profile, **{fact: other}).save()
    for given in ("auto", path):
        caplog.clear()
        assert loaded(tiny_path, profile=given, **SMALL).n_ubatch is None
        text = "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
        assert f"another {fact}" in text


def test_a_damaged_file_is_ignored_with_a_warning(tiny_path, profile, caplog):
    path = profile.save()
    whole = path.read_text()
    for broken in ("", "{", "[]", '{"format": 1}', whole.replace("64", '"many"'), whole[:-40]):
        caplog.clear()
        path.write_text(broken)
        assert loaded(tiny_path, profile="auto", **SMALL).n_ubatch is None
        assert any(record.levelno == logging.WARNING for record in caplog.records)
        with pytest.raises(ProfileError, match="profile:"):
            Llama(tiny_path, profile=path)


def test_files_that_are_odd_json_are_damaged_too(tiny_path, profile, caplog):
    """Deeper than Python reads, or with a value of another type where profiles are compared."""
    path = profile.save()
    dataclasses.replace(profile, goal="ttft", params={"n_ubatch": 128}).save()
    whole = path.read_text()
    for broken in ("[" * 200_000, whole.replace('"2026-01-01T00:00:00+0000"', "5")):
        caplog.clear()
        path.write_text(broken)
        assert loaded(tiny_path, profile="auto", **SMALL).n_ubatch == 128
        assert "is damaged" in caplog.text
        with pytest.raises(ProfileError, match="is damaged"):
            Llama(tiny_path, profile=path)


def test_threads_that_save_at_once_do_not_trip_over_each_other(profile, own_cache):
    with ThreadPoolExecutor(4) as pool:
        paths = [done.result() for done in [pool.submit(profile.save) for _ in range(200)]]
    assert list(own_cache.iterdir()) == [paths[0]]
    assert Profile.load(paths[0]) == profile


def test_a_save_that_fails_leaves_nothing_behind(profile, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        profile.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_what_was_found_is_not_lost_where_it_cannot_be_saved(tiny_path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_CRAB_CACHE", str(tmp_path / "file"))
    report = tune(tiny_path, budget_sec=0.5, params=LlamaParams(n_threads=1))
    assert report.profile_path is None
    assert any("could not be saved" in note for note in report.notes)


def test_one_field_that_does_not_fit_takes_only_its_kind_along(profile):
    tuned = dataclasses.replace(
        profile, params={"n_ubatch": 64, "n_seq_max": 4, "flash_attn_type": "disabled"}
    )
    params = tuned.apply(LlamaParams(n_outputs_max=1))
    assert (params.n_ubatch, params.n_seq_max, params.flash_attn_type) == (64, None, "disabled")
    params = tuned.apply(LlamaParams(type_v="q8_0"))
    assert (params.n_ubatch, params.n_seq_max, params.flash_attn_type) == (64, 4, None)


def test_the_newest_is_the_newest_in_any_time_zone(tiny_path, profile):
    dataclasses.replace(profile, created="2026-03-01T12:00:00+1000").save()
    dataclasses.replace(
        profile, goal="ttft", params={"n_ubatch": 128}, created="2026-03-01T10:00:00+0000"
    ).save()
    assert loaded(tiny_path, profile="auto", **SMALL).n_ubatch == 128


def test_a_name_that_is_no_goal_says_which_there_are(tiny_path):
    for name in ("fastest", ""):
        with pytest.raises(ProfileError, match=f"'{name}' is neither a file nor one of auto, lat"):
            Llama(tiny_path, profile=name)


def test_a_field_that_is_no_lever_makes_a_file_damaged(profile, tmp_path):
    path = dataclasses.replace(profile, params={"rope_freq_base": 1.0}).save(tmp_path / "p.json")
    with pytest.raises(ProfileError, match="rope_freq_base"):
        Profile.load(path)


def test_the_newest_of_all_goals_counts_and_a_goal_can_be_named(tiny_path, profile):
    profile.save()
    dataclasses.replace(
        profile, goal="ttft", params={"n_ubatch": 128}, created="2026-02-01T00:00:00+0000"
    ).save()
    assert loaded(tiny_path, profile="auto", **SMALL).n_ubatch == 128
    assert loaded(tiny_path, profile="latency", **SMALL).n_ubatch == 64
    assert loaded(tiny_path, profile="throughput", **SMALL).n_ubatch is None


def test_a_named_file_is_used_and_that_of_another_model_refused(
    tiny_path, tiny_swa_path, profile, tmp_path
):
    path = profile.save(tmp_path / "mine.json")
    assert json.loads(path.read_text())["params"]["n_ubatch"] == 64
    assert Profile.load(path) == profile
    assert loaded(tiny_path, profile=path, **SMALL).n_ubatch == 64
    with pytest.raises(ParameterError, match=r"profile: .*mine\.json is of another model"):
        Llama(tiny_swa_path, profile=path)
    with pytest.raises(ProfileError, match="is neither a file"):
        Llama(tiny_path, profile=tmp_path / "no.json")
    with pytest.raises(ProfileError, match="cannot read"):
        Llama(tiny_path, profile=tmp_path)


def test_params_from_a_profile_and_the_other_doors(tiny_path, profile, tmp_path):
    path = profile.save(tmp_path / "mine.json")
    params = LlamaParams.from_profile(path, model=tiny_path, n_ctx=256)
    assert LlamaParams.from_dict(json.loads(json.dumps(params.to_dict()))) == LlamaParams.from_dict(
        {**params.to_dict(), "model": str(tiny_path), "profile": str(path)}
    )
    with Llama.load(params) as llama:
        assert llama.params.n_ubatch == 64
    with Bed(params) as bed:
        assert bed.params.n_ubatch == 64
    found = AsyncLlama(tiny_path, profile=path, n_ctx=256)
    assert found.llama.params.n_ubatch == 64
    found.llama.close()


def test_a_profile_that_is_no_path_is_refused():
    with pytest.raises(ParameterError, match="profile: expected a path"):
        LlamaParams(profile=3)
