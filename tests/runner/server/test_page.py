"""The page at `/`, in Chromium: by pointer, by keyboard, on a telephone, and through broken connections."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

import runner
from runner.generation.model import Model
from runner.generation.options import Sampling
from runner.server.settings import Settings
from scripts.bench.paced_server import Served, served, until
from tests.support.browser import CHROMIUM, Desk, chromium, desk
from tests.support.cable import cable
from tests.support.jobs import line, new_data
from tests.support.jobs import text_of as lines_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium"),
]
KNOWN = "The French translation of I am looking for two white boats is:"
# Not all tokens that follow are as good as certain; some in Chinese are parts of a character.
UNSURE = "The SQL command to show the name and the age of every student who lives in Spain is:"
CHINESE = "The Chinese translation of I have four birds is:"
# Seconds a part, so that a pass of 72 takes about 0.8 s, or a minute.
SLOW, VERY_SLOW = 0.01, 0.8
TELEPHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def model(miniature: tuple[Path, Path]) -> Model:
    return runner.load(miniature[1])


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Served]:
    with served(lambda: model) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def at_desk(browser: Browser, server: Served) -> Iterator[Desk]:
    with desk(browser, server.address) as found:
        found.open()
        yield found
    server.engine.pause = 0.0
    until(lambda: not server.engine.queue())


@pytest.fixture
def text_of(model: Model) -> Callable[..., str]:
    def generated(prompt: str, count: int, **sampling: object) -> str:
        (found,) = model.generate_all([prompt], max_new_tokens=count, sampling=Sampling(**sampling))
        return model.text(found)

    return generated


def test_a_text_grows_to_what_generate_writes(at_desk: Desk, server: Served, text_of) -> None:
    server.engine.pause = SLOW / 2
    at_desk.generate(KNOWN, max_tokens=8)
    at_desk.wait_for_tokens(2)
    assert len(at_desk.text) < len(text_of(KNOWN, 8))
    at_desk.wait_for_end()
    assert at_desk.text == text_of(KNOWN, 8)
    expect(at_desk.page.locator("#run-status")).to_have_text("8 tokens. Its length is reached.")
    expect(at_desk.page.locator(".given")).to_have_text(KNOWN)


def test_a_text_that_the_model_ends_shows_its_last_token(at_desk: Desk, text_of) -> None:
    at_desk.generate(KNOWN, max_tokens=32)
    at_desk.wait_for_end()
    assert at_desk.text == text_of(KNOWN, 32)
    expect(at_desk.page.locator(".token").last).to_have_attribute("data-special", "</s>")
    expect(at_desk.page.locator("#run-status")).to_contain_text("The model ended it here.")


def test_characters_of_several_tokens_are_whole(at_desk: Desk, text_of) -> None:
    at_desk.generate(CHINESE, max_tokens=16)
    at_desk.wait_for_end()
    assert at_desk.text == text_of(CHINESE, 16)
    pieces = at_desk.page.locator(".token:not([data-special])").all_text_contents()
    assert all(pieces) and "\ufffd" not in "".join(pieces)


def test_tokens_have_the_colour_of_their_probability(at_desk: Desk) -> None:
    at_desk.generate(UNSURE, max_tokens=12, temperature=2, seed=1)
    at_desk.wait_for_end()
    levels = at_desk.page.locator(".token").evaluate_all("found => found.map(each => each.dataset.level)")
    assert set(levels) <= set("012345") and len(set(levels)) > 2
    colours = dict(
        at_desk.page.locator("#legend li").evaluate_all(
            "found => found.map(each => [each.dataset.level, getComputedStyle(each).backgroundColor])"
        )
    )
    shown = at_desk.page.locator(".token").evaluate_all(
        "found => found.map(each => [each.dataset.level, getComputedStyle(each).backgroundColor])"
    )
    assert all(colours[level] == colour for level, colour in shown)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_differ_in_lightness_and_leave_the_text_readable(
    browser: Browser, server: Served, scheme: str
) -> None:
    with desk(browser, server.address, color_scheme=scheme) as found:
        found.open()
        card, ink = (
            luminance(found.page.locator(".text").evaluate(f"each => getComputedStyle(each).{name}"))
            for name in ("backgroundColor", "color")
        )
        ramp = [
            luminance(each)
            for each in found.page.locator("#legend li:not([data-level='0'])").evaluate_all(
                "found => found.map(each => getComputedStyle(each).backgroundColor)"
            )
        ]
        assert (card > ink) == (scheme == "light")
        assert [card, *ramp] == sorted([card, *ramp], reverse=scheme == "light")
        # WCAG's AA for text.
        assert all(contrast(each, ink) >= 4.5 for each in [card, *ramp])
        for quiet in (".help", ".figures dt", "#run-status", "::placeholder"):
            selector = "#prompt" if quiet.startswith("::") else quiet
            pseudo = f", '{quiet}'" if quiet.startswith("::") else ""
            colour = found.page.locator(selector).first.evaluate(
                f"each => getComputedStyle(each{pseudo}).color"
            )
            assert contrast(luminance(colour), card) >= 4.5, quiet


def test_alternatives_stand_under_the_pointer(at_desk: Desk) -> None:
    at_desk.generate(UNSURE, max_tokens=12, temperature=1, seed=1)
    at_desk.wait_for_end()
    token = at_desk.page.locator(".token").nth(1)
    word = token.text_content().strip()
    token.hover()
    rows = at_desk.page.locator("#alternatives li")
    expect(rows.first).to_be_visible()
    shares = [float(share.strip("<%")) for share in rows.locator(".share").all_text_contents()]
    assert len(shares) >= 5 and shares == sorted(shares, reverse=True) and sum(shares) < 101
    expect(at_desk.page.locator("#alternatives .chosen")).to_contain_text(word)
    at_desk.page.locator("h1").hover()
    expect(at_desk.page.locator("#alternatives")).to_be_hidden()


def test_keys_go_from_token_to_token(at_desk: Desk) -> None:
    at_desk.generate(UNSURE, max_tokens=12, temperature=1, seed=1)
    at_desk.wait_for_end()
    page = at_desk.page
    assert page.locator(".token[tabindex='0']").count() == 1
    page.locator(".token[tabindex='0']").focus()
    words = [page.locator("#alternatives .chosen .name").text_content()]
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        words.append(page.locator("#alternatives .chosen .name").text_content())
    shown = page.locator(".token").all_text_contents()
    assert words == [each.replace(" ", "·") for each in shown[:4]]
    focused = page.locator(".token:focus")
    expect(focused).to_have_attribute("aria-describedby", "alternatives")
    page.keyboard.press("Escape")
    expect(page.locator("#alternatives")).to_be_hidden()
    page.keyboard.press("End")
    expect(page.locator(".token").last).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator(".token").first).to_be_focused()


def test_all_of_it_works_by_keyboard(at_desk: Desk, server: Served, text_of) -> None:
    page, keys = at_desk.page, at_desk.page.keyboard
    keys.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    keys.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    keys.type(KNOWN)
    server.engine.pause = SLOW
    keys.press("Control+Enter")
    at_desk.wait_for_tokens(2)
    keys.press("Escape")
    expect(page.locator("#go-on")).to_be_focused()
    server.engine.pause = 0.0
    keys.press("Enter")
    at_desk.wait_for_end()
    assert at_desk.text == text_of(KNOWN, 64)
    keys.press("Tab")
    expect(page.locator(".token").first).to_be_focused()


def test_a_stop_ends_the_work_and_going_on_continues_it(at_desk: Desk, server: Served, text_of) -> None:
    server.engine.pause = SLOW
    at_desk.generate(KNOWN, max_tokens=24)
    at_desk.wait_for_tokens(3)
    at_desk.page.click("#stop")
    expect(at_desk.page.locator("#run-status")).to_have_text("Stopped.")
    until(lambda: not server.engine.queue())
    before = at_desk.text
    assert text_of(KNOWN, 24).startswith(before)
    server.engine.pause = 0.0
    at_desk.page.click("#go-on")
    at_desk.wait_for_end()
    assert at_desk.text == text_of(KNOWN, 24)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "-1"),
        ("top_p", "2"),
        ("max_tokens", "0"),
        ("min_p", "7"),
        ("seed", "-3"),
        # JavaScript would send another number.
        ("seed", str(2**53 + 1)),
    ],
)
def test_an_error_stands_beside_its_field(at_desk: Desk, field: str, value: str) -> None:
    at_desk.generate(KNOWN, **{"temperature": "1", field: value})
    error = at_desk.page.locator(f"#{field}-error")
    expect(error).to_contain_text(field if field != "seed" else "whole number")
    expect(at_desk.page.locator(f"#{field}")).to_be_focused()
    expect(at_desk.page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    assert at_desk.page.locator(".error:not(:empty)").count() == 1
    at_desk.page.fill(f"#{field}", "1")
    at_desk.page.click("#generate")
    expect(error).to_have_text("")


def test_a_request_that_is_refused_leaves_the_text_as_it_was(at_desk: Desk, text_of) -> None:
    at_desk.generate(KNOWN, max_tokens=5)
    at_desk.wait_for_end()
    for button in ("#generate", "#go-on"):
        at_desk.page.fill("#temperature", "-1")
        at_desk.page.click(button)
        expect(at_desk.page.locator("#temperature-error")).not_to_be_empty()
        at_desk.wait_for_end()
        assert at_desk.text == text_of(KNOWN, 5)
    at_desk.page.fill("#temperature", "0")
    at_desk.page.fill("#max_tokens", "2")
    at_desk.page.click("#go-on")
    at_desk.wait_for_end()
    assert at_desk.text == text_of(KNOWN, 7)


def test_an_empty_prompt_is_said_beside_it(at_desk: Desk) -> None:
    at_desk.generate("")
    expect(at_desk.page.locator("#prompt-error")).to_contain_text("prompt")


def test_html_stays_text(at_desk: Desk) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp; <b>is:"
    at_desk.generate(hostile, max_tokens=4)
    at_desk.wait_for_end()
    expect(at_desk.page.locator(".given")).to_have_text(hostile)
    assert at_desk.page.locator("#output :is(img, script, b)").count() == 0
    at_desk.page.reload()
    expect(at_desk.page.locator(".given")).to_have_text(hostile)
    assert not at_desk.elsewhere


def test_nothing_comes_from_elsewhere_and_no_rule_is_broken(at_desk: Desk) -> None:
    asked = []
    at_desk.page.on("request", lambda request: asked.append(request.url))
    at_desk.page.reload()
    at_desk.generate(UNSURE, max_tokens=3)
    at_desk.wait_for_end()
    assert len(asked) > 8 and all(url.startswith(at_desk.address) for url in asked)
    assert not at_desk.elsewhere
    assert not [line for line in at_desk.complaints if "404" not in line]


def test_the_pass_is_seen_as_it_streams(at_desk: Desk, server: Served) -> None:
    server.engine.pause = SLOW * 4
    at_desk.generate(KNOWN, max_tokens=3)
    page = at_desk.page
    expect(page.locator(".cell")).to_have_count(70)
    page.locator(".cell[data-state='done']").nth(20).wait_for()
    expect(page.locator(".cell[data-state='now']")).to_have_count(1)
    expect(page.locator("#figure-block")).to_have_text(re.compile(r"\d+ of 70"))
    expect(page.locator("#figure-next")).to_have_text(re.compile(r"\d\.\d s"))
    expect(page.locator("#figure-place")).to_have_text("alone")
    expect(page.locator("#queue .mine")).to_contain_text("of 3")
    expect(page).to_have_title(re.compile(r"block \d+/70"))
    at_desk.wait_for_tokens(1)
    expect(page.locator("#figure-tokens")).to_have_text("1 of 3")


def test_who_waits_sees_the_place(browser: Browser, model: Model) -> None:
    """With room for one in a pass, the second page waits."""
    with served(lambda: model, most=1) as server, desk(browser, server.address) as first:
        server.engine.pause = SLOW
        first.open()
        first.generate(KNOWN, max_tokens=40)
        first.wait_for_tokens(1)
        with desk(browser, server.address) as second:
            second.open()
            second.generate(UNSURE, max_tokens=2)
            expect(second.page.locator("#figure-place")).to_have_text("1 of 1")
            expect(second.page.locator("#run-status")).to_contain_text("number 1 of 1")
            expect(second.page.locator("#queue-counts")).to_have_text("1 in the pass, 1 waiting")


def test_a_text_survives_a_reload_in_the_middle_of_a_pass(at_desk: Desk, server: Served, text_of) -> None:
    server.engine.pause = SLOW
    # No other test asks for as many, so nothing is known of it.
    at_desk.generate(KNOWN, max_tokens=7)
    at_desk.wait_for_tokens(3)
    passes = server.engine.progress.number
    at_desk.page.reload()
    at_desk.wait_for_tokens(3)
    at_desk.wait_for_end()
    assert at_desk.text == text_of(KNOWN, 7)
    assert at_desk.page.input_value("#prompt") == KNOWN
    # The server still had its work: none of it was done again.
    assert server.engine.progress.number <= passes + 4


def test_a_drawn_text_survives_a_broken_connection(browser: Browser, server: Served, text_of) -> None:
    with cable(server.port) as line, desk(browser, f"http://127.0.0.1:{line.port}") as found:
        found.open()
        server.engine.pause = SLOW
        found.generate(UNSURE, max_tokens=9, temperature=1)
        found.wait_for_tokens(2)
        seed = int(re.search(r"Seed (\d+)", found.page.inner_text("#run-status"))[1])
        line.cut()
        expect(found.page.locator("#status")).to_have_text("not reached")
        expect(found.page.locator("#run-status")).to_contain_text("trying again")
        assert found.page.locator(".token").count() >= 2
        line.mend()
        server.engine.pause = 0.0
        found.wait_for_end()
        assert found.text == text_of(UNSURE, 9, temperature=1, seed=seed)


def test_jobs_are_added_watched_cancelled_and_their_results_fetched(
    browser: Browser, model: Model, tmp_path: Path
) -> None:
    pytest.importorskip("python_multipart")
    quick, slow = tmp_path / "quick.jsonl", tmp_path / "slow.jsonl"
    quick.write_bytes(lines_of([line(number, prompt=KNOWN, max_tokens=2) for number in range(3)]))
    slow.write_bytes(
        lines_of([line(number, prompt=KNOWN, max_tokens=200, ignore_eos=True) for number in range(2)])
    )
    with (
        served(lambda: model, data=new_data(tmp_path / "data")) as server,
        desk(browser, server.address) as found,
    ):
        found.open()
        rows = found.page.locator("#job-list li")
        found.page.set_input_files("#job-file", quick)
        expect(rows.first).to_contain_text("completed, 3 of 3", timeout=20_000)
        with found.page.expect_download() as download:
            rows.first.get_by_role("button", name="Results").click()
        results = [json.loads(each) for each in download.value.path().read_text().splitlines()]
        assert [each["custom_id"] for each in results] == ["id-0", "id-1", "id-2"]
        server.engine.pause = SLOW
        found.page.set_input_files("#job-file", slow)
        expect(rows).to_have_count(2, timeout=20_000)
        expect(found.page.locator("#queue")).to_contain_text("a job's line")
        rows.first.get_by_role("button", name="Cancel").click()
        server.engine.pause = 0.0
        expect(rows.first).to_contain_text("cancelled", timeout=20_000)
        found.page.set_input_files("#job-file", _wrong(tmp_path))
        expect(rows.first).to_contain_text("failed", timeout=20_000)
        expect(rows.first.locator(".error")).not_to_be_empty()
        assert not found.complaints


def _wrong(folder: Path) -> Path:
    """A file of a line that is none."""
    (folder / "wrong.jsonl").write_text("<b>this is no request</b>\n")
    return folder / "wrong.jsonl"


def test_without_a_data_directory_there_are_no_jobs(at_desk: Desk) -> None:
    expect(at_desk.page.locator("#status")).to_have_text("ready")
    expect(at_desk.page.locator("#jobs")).to_be_hidden()


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser: Browser, model: Model) -> None:
    with (
        served(lambda: model, Settings(keys=("right",))) as server,
        desk(browser, server.address) as found,
    ):
        page = found.page
        page.goto(server.address)
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_contain_text("does not know")
        page.fill("#key", "right")
        page.keyboard.press("Enter")
        page.locator("#status[data-status='ready']").wait_for()
        found.generate(KNOWN, max_tokens=2)
        found.wait_for_end()
        assert len(found.text) > 0
        page.reload()
        page.locator("#status[data-status='ready']").wait_for()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        other = found.context.new_page()
        other.goto(server.address)
        expect(other.locator("#key-dialog")).to_be_visible()


def test_a_telephone_shows_all_of_it_without_sideways_scrolling(browser: Browser, server: Served) -> None:
    with desk(browser, server.address, **TELEPHONE) as found:
        found.open()
        assert not found.is_too_wide
        found.page.locator("#settings summary").tap()
        found.generate("Pneumonoultramicroscopicsilicovolcanoconiosis" * 4 + " " + UNSURE, max_tokens=6)
        found.wait_for_end()
        assert not found.is_too_wide
        found.page.locator(".token").first.tap()
        box = found.page.locator("#alternatives").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert not found.elsewhere


def test_what_the_page_says_of_itself_to_those_who_cannot_see_it(at_desk: Desk) -> None:
    page = at_desk.page
    unnamed = page.locator("button, input, textarea").evaluate_all(
        "found => found.filter(each => !each.labels?.length && !each.textContent.trim()).map(each => each.id)"
    )
    assert unnamed == []
    ids = page.locator("[aria-describedby]").evaluate_all(
        "found => found.flatMap(each => each.getAttribute('aria-describedby').split(' '))"
    )
    assert all(page.locator(f"[id='{each}']").count() == 1 for each in ids)
    at_desk.generate(KNOWN, max_tokens=2)
    at_desk.wait_for_end()
    expect(page.locator("#spoken")).to_contain_text("2 tokens")


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it, of "rgb(1, 2, 3)"."""
    channels = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
