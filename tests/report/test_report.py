"""The report: what it gathers, that nothing in it is markup but its own, and that it works in a real browser."""

import base64
import gzip
import json
import random
import re

import pytest
import torch

from tabom.cli.commands import name_inputs
from tabom.cli.main import main
from tabom.data.encoding import encode_prompt
from tabom.data.trajectories import Trajectory
from tabom.evaluation.compare import compare
from tabom.evaluation.evaluate import Cell, summarise
from tabom.evaluation.replay import replay
from tabom.lab.model import character_tokenizer
from tabom.models.loading import SHIPPED_PATH
from tabom.report.alternatives import replay_tokens
from tabom.report.gather import gather, token_texts
from tabom.report.page import outcome_of_rounds
from tests.conftest import random_model

ATTACK = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


def write_trajectories(path, count, length=256, seed=0, changed=0):
    """Made-up responses, two tokens a step, in prompts and reasons that attack the page."""
    rng = random.Random(seed)
    lines = []
    for index in range(count):
        ids = [rng.randrange(4, 45) for _ in range(length)]
        ids = [4 + (each + 1) % 41 if place < changed else each for place, each in enumerate(ids)]
        order = [step // 2 for step in rng.sample(range(length), length)]
        record = {"id": f"{index}-0", "prompt": f"problem {index} {ATTACK}", "response": "x", "response_token_ids": ids}
        record |= {"decoding_order": order, "entropy": [round(rng.expovariate(1), 4) for _ in ids], "why": ATTACK}
        lines.append(json.dumps({**record, "correct": [True, False, None][index % 3]}) + "\n")
    path.write_text("".join(lines))
    return path


def unpacked(page):
    """The data of a page."""
    packed = re.search(r'<script id="data"[^>]*>([^<]*)</script>', page.read_text())[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_arguments_without_the_name_of_the_option():
    assert name_inputs(["a", "b", "-o", "c"]) == ["--output", "c", "--inputs", "a", "b"]
    assert name_inputs(["-o", "c", "a", "--limit", "3"]) == ["--output", "c", "--limit", "3", "--inputs", "a"]
    assert name_inputs(["--help"]) == ["--help"]


def test_the_page_is_one_small_file_without_network_or_foreign_markup(tmp_path, capsys):
    page = tmp_path / "r.html"
    source = write_trajectories(tmp_path / "t.jsonl", 200)
    assert main(["report", str(source), "-o", str(page), "--title", ATTACK]) == 0
    assert "200 responses" in capsys.readouterr().out
    text = page.read_text()
    assert page.stat().st_size < 2 * 2**20
    assert "owned'</script>" not in text and "<img" not in text
    assert text.count("<script") == 2 and not re.search(r'(src|href)="(?!#)', text)
    records = unpacked(page)["sources"][0]["records"]
    assert [record["correct"] for record in records[:3]] == [True, False, None]
    assert records[0]["prompt"] == f"problem 0 {ATTACK}"


def write_settings(path, **settings):
    """The line of settings that collect writes beside a file of trajectories."""
    path.with_name(path.name + ".rejected").write_text(json.dumps({"policy": "entropy", **settings}) + "\n")


def test_the_page_knows_the_blocks_of_each_token(tmp_path):
    """Those of block-causal attention begin with the prompt, those of full attention with the response."""
    prompt = character_tokenizer()(f"problem 0 {ATTACK}").input_ids
    for name, settings, size, first in (
        ("causal", {"block_size": 8, "block_length": 8, "max_prompt_length": None}, 8, len(prompt)),
        ("cut", {"block_size": 8, "block_length": None, "max_prompt_length": 5}, 8, 5),
        ("full", {"block_size": None, "block_length": 5}, 5, 0),
        ("older", {"block_length": 5}, 5, 0),
        ("one", {"block_size": None, "block_length": None}, 20, 0),
    ):
        source = write_trajectories(tmp_path / f"{name}.jsonl", 1, length=20)
        write_settings(source, **settings)
        assert main(["report", str(source), "-o", str(tmp_path / "r.html")]) == 0
        [record] = unpacked(tmp_path / "r.html")["sources"][0]["records"]
        expected = [(first + place) // size - first // size for place in range(20)]
        assert record.get("blocks") == (expected if max(expected) else None)


def test_everything_is_found(tmp_path, capsys):
    """Answers and tables of an evaluation, the log of a training run, a file of collect and its rejected answers."""
    evaluated, run, collected = tmp_path / "evaluated", tmp_path / "run", tmp_path / "t.jsonl"
    sampler = ["--task", "addition", "--num_prompts", "4", "--samplers", "tokens_per_step=1,max_new_tokens=4"]
    compared = ["--model", str(SHIPPED_PATH), "shipped-block"]
    assert main(["evaluate", *sampler, *compared, "--output_dir", str(evaluated)]) == 0
    assert main(["collect", "--task", "subtraction", "--num_prompts", "12", "--output", str(collected)]) == 0
    run.mkdir()
    log = [{"step": step, "loss": 1 / step, "grad_norm": None} for step in (1, 2, 3)]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": log}).replace("null", "NaN"))
    rejected = collected.with_name("t.jsonl.rejected")
    found = gather(list(map(str, (evaluated, run, collected, rejected))), 200)
    assert [(len(source.records), source.role) for source in found.sources[:2]] == [(4, "base"), (4, "tuned")]
    assert sum(len(source.records) for source in found.sources[2:]) == 12
    assert {source.settings["model"] for source in [found.sources[0], *found.sources[2:]]} == {str(SHIPPED_PATH)}
    assert found.training[str(run)] == log
    page = tmp_path / "r.html"
    assert main(["report", str(evaluated), str(run), str(collected), "--replay", "true", "-o", str(page)]) == 0
    text = page.read_text()
    assert "errors paired by problem" in text and "<caption>± standard error" in text
    record = unpacked(page)["sources"][0]["records"][0]
    assert len(record["alternatives"]) == len(record["probability"]) == len(record["tokens"]) == 4
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(ValueError, match="a folder without"):
        gather([str(nothing)], 1)


def test_replayed_tokens_against_a_pass_a_step(seed, rng):
    for shift in (0, 1):
        model = random_model(seed, logits_shift=shift)
        order = [rng.randrange(-1, 4) for _ in range(7)] + [0, 5]
        trajectory = Trajectory("sort 321=", "", [rng.randrange(4, 45) for _ in order], order)
        found = replay_tokens(model, trajectory)
        prompt = encode_prompt(model.tokenizer, trajectory.prompt)
        for place, step in enumerate(order):
            if step < 0:
                assert found["probability"][place] == 0 and not found["alternatives"][place]
                continue
            shown = [
                token if 0 <= s < step else model.mask_token_id
                for token, s in zip(trajectory.response_token_ids, order, strict=True)
            ]
            with torch.no_grad():
                logits = model.model(input_ids=torch.tensor([prompt + shown])).logits[0, len(prompt) + place - shift]
            logits[model.mask_token_id] = -torch.inf
            p = logits.double().softmax(-1)
            token = trajectory.response_token_ids[place]
            assert found["probability"][place] == pytest.approx(p[token].item(), abs=2e-4)
            entropy = -(p * p.clamp(min=1e-300).log()).sum().item()
            assert found["entropy"][place] == pytest.approx(entropy, rel=2e-3, abs=1e-5)
            p[token] = -1
            best = p.topk(3)
            expected = [(model.tokenizer.decode([i]), v) for v, i in zip(*map(torch.Tensor.tolist, best), strict=True)]
            for (text, value), (wanted, v) in zip(found["alternatives"][place], expected, strict=False):
                assert text == wanted and value == pytest.approx(v, abs=2e-4)
    assert replay(model, trajectory).entropy.shape[1] == len(order)


def test_a_character_of_several_tokens_appears_with_its_last():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    ids = list("aéb".encode())
    assert token_texts(Bytes(), ids) == ["a", "", "é", "b"]
    assert token_texts(character_tokenizer(), character_tokenizer()("1+2=").input_ids) == ["1", "+", "2", "="]


@pytest.fixture
def open_report(browser, tmp_path):
    """Opens the report of some inputs; network, errors and console lines fail the test."""
    pages, problems = [], []

    def open_page(*inputs, limit=200, **settings):
        path = tmp_path / "r.html"
        assert main(["report", *map(str, inputs), "--limit", str(limit), "-o", str(path)]) == 0
        page = browser.new_context(**settings).new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: None if request.url == path.as_uri() else problems.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=30_000)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert page.title() == "TABOM report"
        page.context.close()
    assert problems == []


def masked(page):
    return page.locator(".token.masked").count()


def test_the_slider_the_keys_and_play_move_the_steps(open_report, tmp_path):
    page = open_report(write_trajectories(tmp_path / "t.jsonl", 3, length=20))
    assert masked(page) == 0, "it opens with the whole response"
    page.locator("#step").fill("4")
    assert masked(page) == 12 and page.locator("#now").text_content() == "step 4 of 10"
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    assert masked(page) == 10
    page.keyboard.press("Home")
    assert masked(page) == 20
    page.keyboard.press("Space")
    page.locator("#play", has_text="Pause").wait_for()
    page.locator("#now", has_text="step 10 of 10").wait_for(timeout=15_000)
    page.locator("#play", has_text="Play").wait_for()
    assert masked(page) == 0
    page.keyboard.press(".")
    assert "entropy" in page.locator("#details").text_content() and page.locator(".token.chosen").count() == 1
    page.locator(".token").nth(3).hover()
    assert "step" in page.locator("#details").text_content()


def test_text_stays_text(open_report, tmp_path):
    page = open_report(write_trajectories(tmp_path / "t.jsonl", 3, length=20))
    assert page.locator("#prompt").text_content() == f"problem 0 {ATTACK}"
    assert page.locator("#panels script, #panels img, main script").count() == 0
    assert ATTACK in page.locator("#panels p").first.text_content()


@pytest.mark.parametrize("block", [20, 5])
def test_filters_colours_and_the_pairs_out_of_order(open_report, tmp_path, block):
    """Tokens of two blocks are no pair."""
    source = write_trajectories(tmp_path / "t.jsonl", 9, length=20)
    write_settings(source, block_length=block)
    page = open_report(source)
    for value in ("true", "false", "null"):
        page.select_option("#verdict", value)
        assert page.locator("#record option").count() == 3
    page.select_option("#verdict", "all")
    page.fill("#find", "problem 7")
    assert page.locator("#record option").count() == 1
    first = page.locator(".token").first.get_attribute("style")
    page.select_option("#colour", "entropy")
    assert page.locator(".token").first.get_attribute("style") != first
    record = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[7])
    entropy, order = record["entropy"], record["decoding_order"]
    pairs = [
        (entropy[i], entropy[j])
        for i in range(20)
        for j in range(20)
        if order[i] < order[j] and i // block == j // block
    ]
    said = page.locator("figcaption").first.text_content()
    inside = "" if block == 20 else ", inside blocks"
    assert f"({sum(e > f for e, f in pairs)} of {len(pairs)}{inside})" in said and page.locator("svg .out").count() > 0


def test_two_models_side_by_side(open_report, tmp_path):
    one = write_trajectories(tmp_path / "one.jsonl", 3, length=20)
    two = write_trajectories(tmp_path / "two.jsonl", 3, length=20, changed=2)
    page = open_report(one, two)
    page.select_option("#beside", "1")
    assert page.locator(".tokens").count() == 2
    differing = page.locator(".token.differs").evaluate_all("all => all.map(token => Number(token.dataset.index))")
    assert set(differing) >= {0, 1} and max(differing) <= 3
    page.locator("#step").fill("5")
    assert masked(page) == 20


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A base and a tuned model under long paths on two prompt sets, with answers that were made up."""
    folder = tmp_path_factory.mktemp("evaluated")
    base, tuned = (f"/a/rather/long/path/to/checkpoints/of/many/runs/{name}" for name in ("before", "after"))
    results, comparisons = [], []
    for prompts in ("gsm8k_test.jsonl", "math500.jsonl"):
        for model, right in ((base, 0.5), (tuned, 0.75)):
            cell = Cell(model, prompts, "tokens_per_step=1,policy=margin")
            made = folder / "made.jsonl"
            write_trajectories(made, 4, length=12)
            records = [json.loads(line) | {"index": i} for i, line in enumerate(made.read_text().splitlines())]
            for record in records:
                record["correct"] = record["index"] < 4 * right
                system = {"role": "system", "content": "You are a careful assistant."}
                record["prompt"] = [system, {"role": "user", "content": f"{prompts}, question {record['index']}"}]
                record |= {"pairs": 9, "in_order": 8, "tds": 0.0123456, "tokens": 12, "steps": 6, "positions": 99}
                record["seconds"] = 0.1
            place = cell.folder(folder)
            place.mkdir(parents=True)
            (place / "answers-0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            (place / "settings.json").write_text(json.dumps({"model": str(SHIPPED_PATH)}))
            results.append({**cell._asdict(), **summarise(records)})
        cells = [Cell(model, prompts, "tokens_per_step=1,policy=margin") for model in (base, tuned)]
        comparisons.append(compare(*cells, folder))
    made.unlink()
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "comparison.json").write_text(json.dumps([{"base": base, "tuned": tuned, "comparisons": comparisons}]))
    return folder


def test_the_summary_comes_first_and_says_how_much_better(open_report, evaluated):
    page = open_report(evaluated)
    assert page.locator("h2").all_text_contents() == ["Summary", "Responses, step by step", "Evaluation"]
    assert page.locator("#summary h3").text_content() == "after (tuned) against before (base)"
    assert page.locator(".change b").all_text_contents() == ["+25.0 ± 25.0"] * 2
    assert page.locator(".bars").first.locator(".bar > span:last-child").all_text_contents() == [
        "50.0 ± 28.9 %",
        "75.0 ± 25.0 %",
    ]
    colours = page.locator(".track span").evaluate_all("all => all.map(bar => getComputedStyle(bar).backgroundColor)")
    assert len(set(colours)) == 2 and colours[:2] * 2 == colours
    dots = page.locator("#panels .dot").evaluate_all("all => all.map(dot => getComputedStyle(dot).backgroundColor)")
    assert dots == colours[:2], "the same two colours beside the responses, base and tuned"


def test_the_tables_say_what_the_command_line_says(open_report, evaluated):
    page = open_report(evaluated)
    retention = page.locator("td[data-label='retention, %']").all_text_contents()
    assert retention == ["-", "150.0 ± 70.7"]
    assert page.locator("td[data-label='TDS']").all_text_contents() == ["12.3"] * 4
    heads = page.locator("#evaluation table").first.locator("th[scope=col]").all_text_contents()
    assert "unverified" not in heads and not any(head.startswith("pass@") for head in heads)
    assert page.locator("#evaluation tbody th").first.text_content() == "before"


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut(open_report, evaluated, tmp_path, width):
    """No text of the page stands outside of it, and no label of a chart outside of its chart."""
    source = write_trajectories(tmp_path / "t.jsonl", 2, length=30)
    page = open_report(evaluated, source, viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """() => [...document.querySelectorAll("td, th, p, h3, li, label, svg text")].filter((each) => {
            const [inner, outer] = [each, each.closest("svg") || document.body].map((e) => e.getBoundingClientRect());
            return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
        }).map((each) => each.textContent)"""
    )
    assert outside == []
    panels = page.locator("#panels > div").evaluate_all("all => all.map(panel => panel.clientWidth)")
    charts = page.locator("#panels svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().width)")
    assert charts == panels, "a chart is as wide as its panel"


def test_a_list_of_conversations_shows_what_was_asked(open_report, evaluated):
    page = open_report(evaluated)
    options = page.locator("#record option").all_text_contents()
    assert options[0].endswith("gsm8k_test.jsonl, question 0") and not any("careful" in each for each in options)
    assert "careful assistant" in page.locator("#prompt").text_content()
    chosen = page.locator("#source").input_value()
    assert page.locator(f"#beside option[value='{chosen}']").is_disabled()


def test_a_thousand_responses_stay_fluid(open_report, tmp_path):
    page = open_report(write_trajectories(tmp_path / "t.jsonl", 1000), limit=1000)
    assert page.locator("#record option").count() == 1000
    nodes = page.evaluate("document.querySelectorAll('*').length")
    assert nodes < 1000 + 256 * 4 + 200, "only the chosen response is drawn"
    changes = page.evaluate(
        """async () => {
            const changed = [];
            const observer = new MutationObserver((records) => changed.push(...records));
            observer.observe(document.getElementById("panels"), { attributes: true, childList: true, subtree: true });
            viewer.show(50);
            await new Promise(requestAnimationFrame);
            changed.length = 0;
            viewer.show(51);
            await new Promise(requestAnimationFrame);
            return changed.filter((record) => record.target.matches(".token")).length;
        }"""
    )
    assert changes == 2, "a step touches the tokens that it unmasks and no others"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(open_report, tmp_path, scheme):
    settings = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    long_name = tmp_path / ("a-rather-long-name-of-a-model-" * 3 + ".jsonl")
    page = open_report(write_trajectories(long_name, 3), write_trajectories(tmp_path / "t.jsonl", 3), **settings)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_is_readable_on_a_chip_that_shows(open_report, tmp_path, scheme):
    """Text on every step's colour: WCAG AA; the first and the last chip against the page; a token against its mask."""
    page = open_report(write_trajectories(tmp_path / "t.jsonl", 1), color_scheme=scheme)
    chips = page.locator(".token").evaluate_all("all => all.map(t => [t.style.color, t.style.backgroundColor])")
    for pair in chips:
        assert contrast(*pair) >= 4.5, pair
    order = json.loads((tmp_path / "t.jsonl").read_text())["decoding_order"]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#step").fill("0")
    page.wait_for_timeout(300)  # the transition
    mask = page.locator(".token").first.evaluate("token => getComputedStyle(token).backgroundColor")
    for step in (0, max(order)):
        chip = chips[order.index(step)][1]
        assert contrast(chip, paper) >= 1.3 and contrast(chip, mask) >= 1.2, (step, chip, paper, mask)


def contrast(one, other):
    """WCAG's, from 1 to 21."""
    bright, dark = sorted(map(luminance, (one, other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour):
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_training_curves(open_report, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        log = [{"step": step, "loss": 1 / step, "epoch": 0.1 * step, "train_runtime": 3} for step in range(1, 9)]
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    page = open_report(tmp_path / "a", tmp_path / "b")
    assert page.locator("#training figcaption").all_text_contents() == ["loss"]
    assert page.locator("#training polyline").count() == 2 and page.locator("#training .legend").count() == 2


def test_rounds_have_a_summary_and_the_responses_of_the_newest(tmp_path):
    estimate = {"mean": 0.5, "error": 0.1}
    entries = [
        {"round": 0, "accuracy": estimate, "pass_at": {"1": estimate, "4": estimate}},
        {
            "round": 1,
            "accuracy": {"mean": 0.75, "error": 0.1},
            "pass_at": {"4": {"mean": None}},
            "kl": 0.1,
            "reward": None,
        },
    ]
    folder = tmp_path / "run" / "rounds" / "001"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "rounds.json").write_text(json.dumps(entries))
    record = {"id": "0-0", "prompt": "1+1=", "response": "2", "correct": True, "why": ""}
    (folder / "rollouts.jsonl").write_text(json.dumps(record) + "\n")
    wrong = record | {"correct": False, "id": "0-1"}
    (folder / "rollouts.jsonl.rejected").write_text(json.dumps({"policy": "entropy"}) + "\n" + json.dumps(wrong) + "\n")
    found = gather([str(tmp_path / "run")], limit=10)
    [log] = found.rounds.values()
    assert log == [{"step": 0, "accuracy, %": 50, "pass@4, %": 50}, {"step": 1, "accuracy, %": 75, "kl": 0.1}]
    assert [[r["correct"] for r in source.records] for source in found.sources] == [[True], [False]]
    assert found.sources[0].settings == {"policy": "entropy"}
    assert outcome_of_rounds(log) == "1 rounds, accuracy 50.0 → 75.0 %, pass@4 50.0 → 50.0 %"


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("results.json", '[{"accu', "is not whole"),
        ("results.json", "[1]", "result 0 has no accuracy, answers"),
        ("results.json", '[{"model": "a"}]', "result 0 has no accuracy, answers, pass_at"),
        ("comparison.json", '[{"base": "a"}]', "comparison 0 has no comparisons, tuned"),
        ("trainer_state.json", '{"log_history": 3}', "expected a list 'log_history', got 3"),
    ],
)
def test_a_torn_document_of_a_run_is_one_line(tmp_path, capsys, name, content, problem):
    (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert f"{name}: {problem}" in error or f"{name} {problem}" in error
    assert not (tmp_path / "page.html").exists()
