"""The console in a real Chromium, with the real hook; a stand-in for vLLM echoes prompts."""

import hashlib
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from browser import PHONE, Page, chromium, needs_chromium
from bundles import write_word_bundle
from echo import KEY, PATIENT, TASKS, WordEmbedder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from stub import serving

from fedrouter.bundle import Bundle
from fedrouter.serve import canary
from fedrouter.serve.access import Access
from fedrouter.serve.limits import Limits
from fedrouter.serve.routing import Routing
from fedrouter.serve.second import Second
from fedrouter.types import TaskCluster

pytestmark = needs_chromium
TENANTS = {hashlib.sha256(name.encode()).hexdigest(): name for name in ("ann", "bob")}
FAR = "zebra " * 30
SECRET = "the tea of ann is oolong"


def words(bundle: Bundle, fallback: str | None = None) -> Routing:
    return Routing(bundle, WordEmbedder(), str, fallback, Limits(**PATIENT))


def post(url: str, path: str, payload: Any, key: str = "") -> Any:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{url}{path}", json.dumps(payload).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def say(url: str, text: str, key: str = "") -> None:
    messages = [{"role": "user", "content": text}]
    post(url, "/v1/chat/completions", {"model": "fedrouter", "messages": messages}, key)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def url(word_bundle: Bundle) -> Iterator[str]:
    with serving(lambda: words(word_bundle), pause_s=0.03) as address:
        yield address


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Page]:
    page = Page(browser, url)
    page.complaints()
    yield page.open()
    assert page.complaints() == [], "no errors and no violations of the content policy"


def test_empty_states_say_what_to_do(page: Page) -> None:
    page.shows("#where", "Nothing is typed yet")
    assert all(name in page.text("#where") for name in TASKS)
    page.tab("map")
    page.shows("#legend", "No decisions yet")
    page.tab("traffic")
    page.shows("#decisions", "None yet")
    page.tab("bundles")
    page.shows("#reload", "There is no other bundle here")
    assert page.text("#problem") == ""


def test_shows_while_typing_where_a_prompt_goes(page: Page, word_bundle: Bundle) -> None:
    page.type(TASKS["headline"])
    page.shows("#where .name", word_bundle.clusters[0].adapter)
    assert page.text("#where .how").startswith("within (0.00 × radius) of headline")
    assert page.texts("#where .bar span:first-child")[0] == "headline"
    chosen, *others = page.driver.find_elements(By.CSS_SELECTOR, "#where .fill")
    assert chosen.size["width"] < min(one.size["width"] for one in others)
    page.find("#prompt").clear()
    page.type(FAR)
    page.shows("#where .how", "falls back")
    assert "far (" in page.text("#where .how")
    assert page.text("#where .name") == "base"
    assert page.find("#where .chosen.beyond")
    page.find("#prompt").clear()
    page.type(" ")
    page.shows("#where", "Nothing is typed yet")


def test_an_answer_streams_in_and_can_be_judged(page: Page, word_bundle: Bundle) -> None:
    adapter = word_bundle.clusters[1].adapter
    page.type(TASKS["summary"], send=True)
    growing = page.until(lambda: page.text(".answer .text"))
    assert "friends" not in growing, "it must show before it is complete"
    page.shows(".answer .text", f"{adapter} says: {TASKS['summary']}")
    page.until(lambda: "running" not in page.find(".answer .text").get_attribute("class"))
    assert page.text(".answer .name") == adapter
    assert "margin" in page.text(".answer .why")
    assert "routed in" in page.text(".answer .why")
    page.find(".judge button").click()
    page.until(lambda: page.find(".judge button").get_attribute("aria-pressed") == "true")
    page.tab("traffic")
    page.shows("#decisions", "good")


def test_a_double_enter_sends_once(page: Page) -> None:
    page.type(TASKS["summary"] + Keys.ENTER + Keys.ENTER)
    page.shows(".answer .text", "two friends")
    page.until(lambda: page.find("#send").is_enabled())
    assert len(page.texts("#turns li")) == 1


def test_a_failed_turn_leaves_the_conversation_and_its_text_returns(
    browser: Any, word_bundle: Bundle
) -> None:
    with serving(lambda: words(word_bundle, "reject")) as url:
        page = Page(browser, url).open()
        page.type(FAR.strip(), send=True)
        page.shows(".answer .failed", "no task cluster is near")
        page.until(lambda: page.find("#prompt").get_attribute("value") == FAR.strip())
        page.find("#prompt").clear()
        page.type(TASKS["summary"])
        page.shows("#where .how", "of summary")
        assert page.text("#where .key").startswith("Decided"), "by the only turn"
        page.type("", send=True)
        page.until(lambda: page.find("#send").is_enabled() and page.texts(".answer .text"))
        page.shows(".answer .text", "says: summarise")
        assert page.texts("#turns .said") == [TASKS["summary"]]
        page.type(f"{TASKS['headline']} ENGINE-DIES now", send=True)
        page.shows(".answer .failed", "The server stopped while it answered.")
        assert "EngineCore" not in page.text("#turns")
        page.until(lambda: "ENGINE-DIES" in page.find("#prompt").get_attribute("value"))
        page.complaints()  # the 400 is expected


def test_an_answer_can_be_stopped_or_abandoned(browser: Any, word_bundle: Bundle) -> None:
    with serving(lambda: words(word_bundle), pause_s=0.3) as url:
        page = Page(browser, url).open()
        for button in ("#stop", "#anew"):
            page.type(FAR * 10, send=True)
            page.until(lambda: "zebra" in (page.texts(".answer .text") or [""])[-1])
            assert not page.find("#send").is_displayed()
            page.click(button)
            page.until(lambda: page.find("#send").is_enabled() and page.find("#send").is_displayed())
            if button == "#stop":
                assert page.text(".answer .text").endswith("(stopped)")
                assert page.find("#prompt").get_attribute("value") == "", "the turn counts as answered"
        assert page.texts("#turns li") == []
        page.type(TASKS["headline"], send=True)
        page.shows(".answer .text", "says: write")
        assert len(page.texts("#turns li")) == 1
        page.click("#stop")
        assert page.complaints() == []


@pytest.mark.parametrize("tokens", ["1.5", "-3", "0", ""])
def test_an_impossible_number_of_tokens_is_not_sent(page: Page, tokens: str) -> None:
    page.find("#tokens").clear()
    page.find("#tokens").send_keys(tokens)
    page.type(TASKS["headline"], send=True)
    assert page.driver.switch_to.active_element.get_attribute("id") == "tokens", "the browser says why"
    assert page.find("#prompt").get_attribute("value") == TASKS["headline"]
    assert page.texts("#turns li") == []


def test_follow_ups_show_which_turn_decides(page: Page) -> None:
    page.type(TASKS["summary"], send=True)
    page.until(lambda: page.find("#send").is_enabled() and page.text(".answer .why"))
    page.type(FAR)
    page.shows("#where .key", "Turn 1 of 2 decides")
    assert "decides" in page.find("#turns .said").get_attribute("class")
    page.click("#anew")
    page.shows("#where .key", "Decided")
    assert page.texts("#turns li") == []


def test_side_by_side_with_the_base_the_generalist_or_an_adapter(page: Page, word_bundle: Bundle) -> None:
    others = ["base", word_bundle.generalist or "", word_bundle.clusters[2].adapter]
    for number, other in enumerate(others):
        page.choose("#beside", other)
        page.type(TASKS["headline"], send=True)
        page.until(lambda: len(page.texts(".answer")) == 2 * number + 2)  # noqa: B023
        page.until(lambda: f"{other} says" in page.texts(".answer .text")[-1])  # noqa: B023
        page.until(lambda: page.find("#send").is_enabled())
        assert ("from the routed answers above" in page.texts(".answer .why")[-1]) == (number > 0)
    first, second = page.driver.find_elements(By.CSS_SELECTOR, ".answer")[:2]
    assert first.rect["y"] == second.rect["y"], "side by side"


def test_map_traffic_and_filters(page: Page, url: str, word_bundle: Bundle) -> None:
    for text in [TASKS["headline"]] * 3 + [FAR]:
        say(url, text)
    page.type(TASKS["summary"])
    page.shows("#where .how", "summary")
    page.tab("map")
    page.until(lambda: len(page.driver.find_elements(By.CSS_SELECTOR, "#picture .past")) >= 4)
    assert len(page.driver.find_elements(By.CSS_SELECTOR, "#picture .ring")) == len(TASKS)
    assert page.find("#picture .past.far") and page.find("#picture .now")
    assert "a, b" in page.text("#legend"), "the clients"
    page.tab("traffic")
    page.shows("#adapters", word_bundle.clusters[0].adapter)
    page.choose("#by-adapter", "base")
    page.until(lambda: set(page.texts("#decisions tbody .name")) == {"base"})
    page.choose("#by-adapter", "all")
    page.click("#by-fallback")
    page.until(lambda: set(page.texts("#decisions tbody .name")) == {"base"})
    page.choose("#by-outcome", "failed")
    page.shows("#decisions", "No decision matches")


def test_a_second_bundles_decisions_have_its_own_radii_and_are_counted_beside_the_map(
    browser: Any, word_bundle: Bundle, tmp_path: Path
) -> None:
    names = dict(zip(TASKS, ("news", "chats", "questions"), strict=True))
    clusters = [
        replace(cluster, name=names[cluster.name], adapter="", radius=7.5) for cluster in word_bundle.clusters
    ]
    two = write_word_bundle(tmp_path / "two", seeds=(10, 11, 12), clusters=clusters)
    second = lambda first: Second(first.load_beside(two.path), 1.0)  # noqa: E731
    with serving(lambda: words(word_bundle), second=second) as url:
        say(url, TASKS["headline"])
        page = Page(browser, url).open()
        page.type(TASKS["headline"])
        page.shows("#where .how", "of news")
        assert page.texts("#where .bar span:first-child")[0] == "news"
        assert len(page.texts("#where .bar")) == 3
        assert all(of.endswith("of 7.50") for of in page.texts("#where .bar .of"))
        page.shows("#where .key", "by bundle two")
        page.tab("map")
        page.shows("#legend", "Not shown: 1 decision of other bundles")
        assert "No decisions yet" not in page.text("#legend")
        assert "another bundle decided" in page.text("#legend")
        say(url, " ")
        page.shows("#legend", "2 decisions of other bundles")
        assert page.complaints() == []


def test_the_map_counts_one_decision_and_those_without_a_vector(browser: Any, word_bundle: Bundle) -> None:
    with serving(lambda: words(word_bundle)) as url:
        say(url, TASKS["headline"])
        page = Page(browser, url).open("#map")
        page.shows("#legend", "the latest decision.")
        say(url, " ")
        page.shows("#legend", "Not shown: 1 decision without a vector")


def test_prompts_and_names_are_text_and_never_markup(page: Page) -> None:
    page.type("<img src=x onerror=alert(1)> <b>bold</b> write a headline", send=True)
    page.shows(".answer .text", "<b>bold</b>")
    assert page.driver.find_elements(By.CSS_SELECTOR, "#turns img, #turns b") == []


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    page.shows("#where", "Nothing is typed yet")
    page.find("#tab-ask").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.find("#map").is_displayed())
    assert page.driver.switch_to.active_element.get_attribute("id") == "tab-map"
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    page.until(lambda: page.find("#ask").is_displayed())
    page.driver.switch_to.active_element.send_keys(Keys.TAB)
    page.until(lambda: page.driver.switch_to.active_element.get_attribute("id") == "prompt")
    page.driver.switch_to.active_element.send_keys(TASKS["headline"] + Keys.TAB + Keys.TAB + Keys.TAB)
    assert page.driver.switch_to.active_element.get_attribute("id") == "send"
    page.driver.switch_to.active_element.send_keys(Keys.SPACE)
    page.shows(".answer .text", "says: write a headline")


def test_back_and_forward_go_through_the_tabs(page: Page) -> None:
    page.type("a draft")
    page.tab("map")
    page.tab("traffic")
    page.driver.back()
    page.until(lambda: page.find("#map").is_displayed())
    page.driver.back()
    page.until(lambda: page.find("#ask").is_displayed())
    assert page.find("#prompt").get_attribute("value") == "a draft", "the page was not loaded anew"
    page.driver.forward()
    page.until(lambda: page.find("#map").is_displayed())
    assert page.find("#tab-map").get_attribute("aria-selected") == "true"


def test_a_phone_sees_all_of_it_without_scrolling_sideways(url: str, tmp_path: Path) -> None:
    say(url, TASKS["headline"])
    with chromium(PHONE, dark=True) as driver:
        page = Page(driver, url).open()
        page.type(TASKS["summary"], send=True)
        page.shows(".answer .text", "says: summarise")
        for tab in ("ask", "map", "traffic", "bundles"):
            page.tab(tab)
            page.until(lambda: page.text("main").strip())
            assert page.js("return document.documentElement.scrollWidth <= innerWidth"), tab
            small = page.js(
                "return [...document.querySelectorAll('main button, [role=tab], main select')]"
                ".filter((one) => one.offsetParent && one.getBoundingClientRect().height < 22).length"
            )
            assert small == 0, f"{tab}: buttons too small to touch"
        background = page.js("return getComputedStyle(document.documentElement).backgroundColor")
        assert sum(int(part) for part in background[4:-1].split(",")) < 120, "dark"
        assert page.complaints() == []


def test_no_label_of_the_map_covers_another_on_a_phone(browser: Any, tmp_path: Path) -> None:
    long = "questions-about-paraphrases"
    clusters = [
        TaskCluster(name, "", 10, ("a",), {name: 10}, radius=3.0) for name in ("headline", "summary", long)
    ]
    bundle = write_word_bundle(tmp_path / "long", clusters=clusters)
    with serving(lambda: words(bundle)) as url, chromium(PHONE) as driver:
        page = Page(driver, url).open()
        for text in (*TASKS.values(), "write a question", "this chat"):
            page.tab("ask")
            page.js("document.getElementById('picture').replaceChildren()")
            page.find("#prompt").clear()
            page.type(text)
            page.until(
                lambda: page.text("#where .how") and not page.find("#where").get_attribute("aria-busy")
            )
            page.tab("map")
            page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "#picture .now"))
            frame, *boxes = page.js(
                "return [...document.querySelectorAll('#picture, #picture text')].map((one) => {"
                " const { left, right, top, bottom } = one.getBoundingClientRect();"
                " return [left, right, top, bottom]; })"
            )
            assert len(boxes) == 4
            for left, right, top, bottom in boxes:
                within = frame[0] <= left and right <= frame[1] and frame[2] <= top and bottom <= frame[3]
                assert within, f"cut off: {text}"
            for one, other in combinations(boxes, 2):
                beside = one[1] <= other[0] or other[1] <= one[0]
                below = one[3] <= other[2] + 4 or other[3] <= one[2] + 4  # a line is higher than its letters
                assert beside or below, f"two labels overlap: {text}"


def test_a_key_is_asked_for_once_and_a_wrong_one_again(browser: Any, word_bundle: Bundle) -> None:
    with serving(lambda: words(word_bundle), Access(KEY), KEY) as url:
        page = Page(browser, url).open()
        page.until(lambda: page.find("#ask-key").get_attribute("open"))
        page.find("#key").send_keys("wrong" + Keys.ENTER)
        page.shows("#key-why", "does not know this key")
        for wrong in ("schlüssel", "ключ", "key\u2019s"):  # no header can carry the last two
            page.js("document.getElementById('key-why').textContent = ''")
            page.find("#key").send_keys(wrong + Keys.ENTER)
            page.shows("#key-why", "does not know this key")
            assert page.text("#problem") == ""
        page.find("#key").send_keys(KEY + Keys.ENTER)
        page.shows("#where", "Nothing is typed yet")
        assert page.driver.switch_to.active_element.get_attribute("id") == "prompt"
        for tab in ("map", "traffic", "bundles", "ask"):
            page.tab(tab)
            assert not page.find("#ask-key").get_attribute("open")
        page.type(TASKS["headline"], send=True)
        page.shows(".answer .text", "says: write a headline")
        stored = page.js(
            "return [localStorage.length, sessionStorage.length, document.cookie, location.href]"
        )
        assert stored[:3] == [0, 0, ""]
        assert KEY not in stored[3] and KEY not in page.driver.page_source
        page.open()
        page.until(lambda: page.find("#ask-key").get_attribute("open"), "in memory only")
        page.complaints()  # the 401s are expected


def test_one_tenant_sees_nothing_of_another(browser: Any, tenants_bundle: Bundle) -> None:
    with serving(lambda: words(tenants_bundle), Access(KEY, TENANTS), KEY) as url:
        say(url, f"{TASKS['headline']} {SECRET}", "ann")
        page = Page(browser, url).open()
        page.find("#key").send_keys("bob" + Keys.ENTER)
        page.shows("#where", "summary")
        seen = []
        page.type(TASKS["headline"])
        page.until(lambda: page.text("#where .how"))
        for tab in ("ask", "map", "traffic", "bundles"):
            page.tab(tab)
            page.until(lambda: page.text("main").strip())
            time.sleep(0.3)
            seen.append(page.driver.page_source)
        shown = " ".join(seen)
        assert "summary" in shown
        assert "ann" not in page.texts("td") and "headline-" not in shown
        assert "oolong" not in shown
        page.tab("traffic")
        page.shows("#decisions", "None yet")
        page.tab("bundles")
        page.shows("#bundle", "SHA-256")
        assert page.text("#reload") == "", "a tenant cannot reload"
        page.complaints()


def test_a_bundle_is_checked_and_then_reloaded(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(canary, "RETRY_S", 0.01)
    one = write_word_bundle(tmp_path / "one")
    two = write_word_bundle(tmp_path / "two", seeds=(0, 11, 12))
    broken = write_word_bundle(tmp_path / "zwei", seeds=(0, 11, 12))
    os.truncate(broken.path / "router.safetensors", 100)
    with serving(lambda: words(one), bundle_root=tmp_path) as url:
        page = Page(browser, url).open("#bundles")
        page.choose("#which", "zwei")
        page.find("#reload .plain").click()
        page.shows("#reload .result", "router.safetensors")
        assert not page.find("#reload button:not(.plain)").is_enabled()
        page.choose("#which", "two")
        page.find("#reload .plain").click()
        page.shows("#reload .result", "two is valid")
        assert two.clusters[1].adapter in page.text("#reload .result")
        assert "one" in page.text("#bundle")
        page.find("#reload button:not(.plain)").click()
        page.shows("#bundle", two.clusters[1].adapter)
        page.shows("#served", "two")
        page.complaints()  # the 400 is expected


def test_a_rejected_prompt_and_a_lost_server_are_shown(browser: Any, word_bundle: Bundle) -> None:
    with serving(lambda: words(word_bundle, "reject")) as url:
        page = Page(browser, url).open()
        page.type(FAR)
        page.shows("#where .how", "rejected")
        page.type("", send=True)
        page.shows(".answer .text", "no task cluster is near")
        page.until(lambda: page.find("#prompt").get_attribute("value"))
        page.find("#prompt").clear()
        page.type(TASKS["summary"])
        page.shows("#where .how", "of summary")
    page.type(" more of it")
    page.shows("#problem", "The server does not answer")
    page.shows("#where", "This text has no decision")
    page.type("", send=True)
    page.shows(".answer .text", "The connection was lost")
    page.until(lambda: page.find("#prompt").get_attribute("value") == f"{TASKS['summary']} more of it")
    page.complaints()


def test_the_first_view_is_small_and_contacts_no_other_host(browser: Any, url: str) -> None:
    browser.get_log("performance")
    page = Page(browser, url).open()
    page.shows("#where", "Nothing is typed yet")
    events = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 3
    assert [one for one in asked if not one.startswith((url, "about:"))] == []
    sizes = [e["params"]["encodedDataLength"] for e in events if e["method"] == "Network.loadingFinished"]
    assert sum(sizes) <= 100_000


def test_no_console_where_it_is_off(word_bundle: Bundle) -> None:
    with (
        serving(lambda: words(word_bundle), console=False) as url,
        pytest.raises(urllib.error.HTTPError, match="404"),
    ):
        urllib.request.urlopen(f"{url}/fedrouter/", timeout=10)


def test_the_page_forbids_scripts_within_it(url: str) -> None:
    with urllib.request.urlopen(f"{url}/fedrouter", timeout=10) as answer:
        assert answer.url == f"{url}/fedrouter/"
        policy = answer.headers["content-security-policy"]
        html = answer.read().decode()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "style=" not in html and "onclick" not in html
    assert html.count("<script") == 1
