"""`posthoc eval report`: the numbers against brute force, the page as a strict parser sees it, what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from posthoc import PosthocError
from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.features import Features
from posthoc.adapters.source_arrays import ListSource
from posthoc.cli import main
from posthoc.eval import calibration, ood, retrieval, selective, svg
from posthoc.eval.bootstrap import Interval
from posthoc.eval.caps import cap_cosine
from posthoc.eval.inputs import Scored, from_arrays
from posthoc.eval.metric_words import words
from posthoc.eval.ood_statistics import OodMetrics
from posthoc.eval.plots import COLOURS, best_possible
from posthoc.eval.report import FILES, write_report
from posthoc.eval.report_figures import drawn_names, histogram_figure
from posthoc.eval.report_images import BYTES, SIDE, gallery, retrieval_strips
from posthoc.eval.results import Results, read_run, table_from_dict
from posthoc.eval.table import Cell, Table

FEW = {"resamples": 30}
HOSTILE = """</title><script>alert("1")</script>' onload=x $x_{ 日本 & <b>"""


def arrays(n=90, shift=0.0, seed=0, embedding=True):
    """A labelled score file of four classes; logits shrink with `shift`."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 4
    logits = rng.normal(size=(n, 4))
    logits[np.arange(n), label] += 3 * (1 - shift)
    made = {"label": label, "logits": logits.astype(np.float32), "mine": -logits.max(1) + rng.normal(size=n) * 0.1}
    return made | ({"embedding": logits.astype(np.float32)} if embedding else {})


def sets(**names):
    names = names or {"photos": 0.0, "textures": 1.0}
    return [from_arrays(name, arrays(90 - 10 * k, shift, k)) for k, (name, shift) in enumerate(names.items())]


def with_images(name, n=64, seed=0, size=20, noise=False, **more):
    """A set with images in memory, embeddings and concentrations; no network."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(n, 5)).astype(np.float32)
    shape = (n, size, size, 3)
    grey = np.arange(n)[:, None, None, None] + 100 * seed  # of set and row
    pixels = rng.integers(0, 256, shape) if noise else np.broadcast_to(grey, shape)
    images = [Image.fromarray(one) for one in pixels.astype(np.uint8)]
    features = Features.from_arrays(embedding)
    features.source = ListSource(images)
    scores = {"mine": rng.permutation(n) / n}
    return Scored(
        name,
        scores,
        np.arange(n) % 3,
        embedding=embedding,
        concentration=rng.uniform(5, 50, n),
        features=features,
        **more,
    )


class Page(HTMLParser):
    """Elements with their attributes; fails on a tag that is not closed in order, or a repeated attribute."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), attrs
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, *but):
        return " ".join(text for tag, text in self.text if tag not in ("script", "style", *but))


def check_page(html: str) -> Page:
    """What holds for every page."""
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), key
            assert key not in ("srcset", "action", "formaction", "poster", "data"), key
            if key == "src":
                assert tag == "img"
                assert value.startswith("data:image/")
            if key in ("href", "xlink:href"):
                assert value.startswith("#")
                assert value[1:] in ids
            if key == "aria-labelledby":
                assert value in ids
            for used in re.findall(r"url\(([^)]*)\)", value or ""):
                assert used.startswith("#")
                assert used[1:] in ids
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "button")
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(attributes.get("aria-label") for attributes in page.all("svg") if "aria-hidden" not in attributes)
    script = "".join(text for tag, text in page.text if tag == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    return page


@pytest.fixture
def report(tmp_path):
    def write(*given, runs=(), **options):
        inside, outside = (given[0], given[1:]) if given else (None, ())
        results = write_report(tmp_path / "out", runs, inside, outside, **(FEW | options))
        return (
            results,
            json.loads((tmp_path / "out/results.json").read_text()),
            (tmp_path / "out/index.html").read_text(),
        )

    return write


def test_tables_are_those_of_the_commands(report, tmp_path, capsys):
    inside, outside = sets()
    np.savez(tmp_path / "photos.npz", **arrays())
    np.savez(tmp_path / "textures.npz", **arrays(80, 1.0, 1))
    results, told, _ = report(inside, outside)
    for name, options in (
        ("ood", ["--id", tmp_path / "photos.npz", "--ood", tmp_path / "textures.npz"]),
        ("selective", ["--data", tmp_path / "photos.npz"]),
        ("calibration", ["--data", tmp_path / "photos.npz"]),
        ("retrieval", ["--data", tmp_path / "photos.npz"]),
    ):
        file = tmp_path / f"{name}.json"
        import_module(f"posthoc.eval.{name}").main([*map(str, options), "--resamples", "30", "--output", str(file)])
        for wanted in read_run(file):
            assert any(
                table.cells == wanted.cells
                and table.title == wanted.title
                and (table.notes == wanted.notes or name == "retrieval")
                for _, table in results.tables
            ), name
    capsys.readouterr()
    assert len(told["tables"]) == 5
    first = told["tables"][0]["scores"]["mine"]["auroc"]["value"]
    truth = np.repeat([0, 1], [inside.rows, outside.rows])
    assert first == pytest.approx(roc_auc_score(truth, np.r_[inside.scores["mine"], outside.scores["mine"]]))


def test_results_json_holds_the_numbers_of_the_figures(report):
    inside, outside = sets()
    _, told, _ = report(inside, outside, seed=3)
    assert (told["kind"], told["schema_version"], told["seed"], told["resamples"]) == ("posthoc report", 1, 3, 30)
    assert told["sets"] == [
        {"name": "photos", "role": "id", "rows": 90},
        {"name": "textures", "role": "ood", "rows": 80},
    ]
    assert set(told["made"]) == {"date", "versions", "command", "adapter"}
    assert told["made"]["versions"]["numpy"] == np.__version__
    figures = told["figures"]
    risk = figures["risk_coverage"]
    order = np.argsort(inside.scores["mine"])
    wrong = ~inside.correct[order]
    for coverage, value in zip(risk["coverage"], risk["scores"]["mine"]["risk"], strict=True):
        if (kept := coverage * 90) == round(kept):
            assert value == pytest.approx(wrong[: round(kept)].mean())
            best = max(0, wrong.sum() - (90 - round(kept))) / round(kept)
            assert risk["best"][risk["coverage"].index(coverage)] == pytest.approx(best)
    softmax = figures["reliability"]["softmax"]
    gap = np.abs(np.array(softmax["confidence"]) - softmax["accuracy"]) @ softmax["rows"] / 90
    (table,) = [one for one in told["tables"] if "ece" in one["scores"].get("softmax", {})]
    assert gap == pytest.approx(table["scores"]["softmax"]["ece"]["value"])
    bars = figures["histograms"]["mine"]
    values = np.clip(inside.scores["mine"], bars["edges"][0], bars["edges"][-1])
    for left, right, share in zip(bars["edges"], bars["edges"][1:], bars["shares"]["photos"], strict=False):
        last = right == bars["edges"][-1]
        assert share == pytest.approx(np.mean((values >= left) & ((values <= right) if last else (values < right))))
    assert set(figures["histograms"]) == set(told["tables"][0]["scores"])


def test_histograms_hold_every_image_whatever_the_scores_are():
    rng = np.random.default_rng(0)
    cases = {
        "heavy tails": rng.standard_cauchy(300),
        "constant": np.full(9, 2.5),
        "softmax": 10.0 ** -rng.uniform(0, 30, 400),
        "zeros": np.r_[np.zeros(200), rng.uniform(size=50)],
        "integers": rng.integers(0, 3, 50),
    }
    for name, values in cases.items():
        figure = histogram_figure({"a": values, "b": values[:7]})
        assert (np.diff(figure["edges"]) > 0).all(), name
        for share in figure["shares"].values():
            assert sum(share) == pytest.approx(1), name
        assert figure["logarithmic"] == (name == "softmax"), name
    assert not histogram_figure({"a": rng.uniform(size=1000)})["logarithmic"]


def test_scores_that_are_drawn():
    free = ["f1", "f2", "f3", "f4", "f5", "f6", "f7"]
    assert drawn_names([], free) == free[:6]
    assert drawn_names(["a"], free) == ["a", *free[:5]]
    assert drawn_names([*"abcdefg"], free) == [*"abcd", "f1", "f2"]
    assert drawn_names([*"abcdefg"], []) == [*"abcdef"]


def test_the_same_input_gives_the_same_files(tmp_path):
    def write(name):
        write_report(
            tmp_path / name, [], with_images("photos"), [with_images("textures", 40, 1)], command=[name], **FEW
        )
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first, second = write("one"), write("two")
    a, b = first.pop("results.json"), second.pop("results.json")
    assert first == second
    assert set(first) >= {*FILES[1:], "histogram_mine.png"}
    one, two = json.loads(a), json.loads(b)
    assert one.pop("made")["command"] == ["one"]
    two.pop("made")
    assert one == two


def test_drawings_are_written_as_pictures(tmp_path):
    inside, outside = sets(photos=0.0, textures=1.0)
    write_report(tmp_path, inside=inside, outside=[outside], **FEW)
    for name in ("risk_coverage", "reliability", "histogram_mine"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[0] > 200
        assert pixels.min() < 80 < 250 < pixels.max()  # ink on white


def test_pictures_of_any_names_are_apart_and_those_of_before_go(tmp_path):
    names = ["a/b score", "a b score", "../../evil", "日本語", "имя", "x" * 260, "$x_1$"]
    rng = np.random.default_rng(0)

    def write(kept):
        one, other = (from_arrays(n, {name: rng.normal(size=50) for name in kept}) for n in ("in", "out"))
        write_report(tmp_path, inside=one, outside=[other], **FEW)
        return {path.name for path in tmp_path.glob("*.png")}

    assert len(write(names[:6])) == 6
    (tmp_path / "own.png").write_bytes(b"x")
    assert write(["other"]) == {"histogram_other.png", "own.png"}
    assert len(list(tmp_path.parent.glob("*.png"))) == 0
    write(names[6:])


def test_the_page_is_well_formed_and_asks_for_nothing(report):
    _, told, html = report(*sets(photos=0.0, textures=1.0, near=0.4))
    page = check_page(html)
    text = page.words()
    for title in (
        "Out-of-distribution detection",
        "Calibration",
        "Selective prediction",
        "Retrieval",
        "Where the scores lie",
    ):
        assert title in text
    for table in told["tables"]:
        for name, row in table["scores"].items():
            assert name in text
            for cell in row.values():
                assert f"[{cell['low']:.3f}, {cell['high']:.3f}]" in text
        for note in table["notes"]:
            assert note in text
    values = [float(one["data-v"]) for one in page.all("td") if "data-v" in one]
    first = next(iter(told["tables"][0]["scores"].values()))
    assert values[: len(first)] == [cell["value"] for cell in first.values()]
    better = sum(cell.get("better", False) for t in told["tables"] for r in t["scores"].values() for cell in r.values())
    bold = [attributes for attributes in page.all("b") if attributes.get("class") == "better"]
    assert len(bold) == 2 * better + 1  # in the table, in that of the differences; and the legend's


def test_hostile_names_are_inert(tmp_path):
    """Names of sets, scores, files, titles and notes come from outside: they are shown, and nothing else."""
    cells = {HOSTILE: {HOSTILE: Cell(Interval(0.5, 0.4, 0.6))}, "x": {}}
    table = Table(HOSTILE, (HOSTILE,), cells, (HOSTILE,), {"reference": HOSTILE})
    run = tmp_path / "a&b<i>.json"
    run.write_text(json.dumps([table.as_dict()]))
    inside, outside = (from_arrays(name, arrays(seed=k, shift=k) | {HOSTILE: np.arange(90.0)}) for k, name in
                       enumerate((HOSTILE, "_" + HOSTILE)))  # fmt: skip
    write_report(tmp_path / "out", [run], inside, [outside], **FEW)
    html = (tmp_path / "out/index.html").read_text()
    page = check_page(html)
    assert "<script>alert" not in html
    assert HOSTILE in page.words()
    assert "a&b<i>.json" in page.words()
    labels = [one["aria-label"] for one in page.all("svg") if "aria-label" in one]
    assert any(HOSTILE in label for label in labels)
    assert HOSTILE in json.loads((tmp_path / "out/results.json").read_text())["figures"]["histograms"]


def test_galleries_show_the_ends(report):
    inside, outside = with_images("photos"), with_images("textures", 40, 1)
    before = inside.features.source.images[0].tobytes()
    _, told, html = report(inside, outside)
    page = check_page(html)
    strips = told["figures"]["galleries"]["mine"]
    assert [one["row"] for one in strips["photos: most certain"]] == np.argsort(inside.scores["mine"])[:10].tolist()
    assert [one["row"] for one in strips["photos: least certain"]] == np.argsort(-inside.scores["mine"])[:10].tolist()
    assert [one["row"] for one in strips["OOD: most certain"]] == np.argsort(outside.scores["mine"])[:10].tolist()
    assert {one["set"] for one in strips["OOD: most certain"]} == {"textures"}
    assert inside.features.source.images[0].tobytes() == before
    found, _ = gallery([inside, outside], [inside.scores, outside.scores], "mine")
    row = strips["photos: least certain"][0]["row"]
    shown = Image.open(io.BytesIO(base64.b64decode(found[1].pictures[0].uri.split(",")[1])))
    assert np.asarray(shown.convert("RGB"))[3, 3].tolist() == [row] * 3  # an image's grey is its row
    assert [one.marked for one in found[2].pictures] == [True] * 10
    assert all(one["class"] == "tiny" for one in page.all("img"))


def test_neighbours_lie_in_the_cap_of_their_query(report):
    inside = with_images("photos")
    _, told, html = report(inside)
    check_page(html)
    unit = inside.embedding / np.linalg.norm(inside.embedding, axis=1, keepdims=True)
    seen = told["figures"]["neighbours"]
    others = np.setdiff1d(np.arange(64), np.sort(np.random.default_rng(0).permutation(64)[:32]))
    assert seen["gallery_rows"] == 32
    kappas = []
    for one in seen["queries"]:
        assert one["query"] not in others
        cosines = unit[others] @ unit[one["query"]]
        cap = cap_cosine([inside.concentration[one["query"]]], 5, 0.05)[0]
        assert one["neighbours"] == others[np.argsort(-cosines)[:8]].tolist()
        assert one["in_set"] == (np.sort(cosines)[::-1][:8] >= cap).tolist()
        assert one["set_size"] == (cosines >= cap).sum()
        kappas.append(one["kappa"])
    assert kappas == sorted(kappas, reverse=True)
    assert min(kappas) == inside.concentration[np.setdiff1d(np.arange(64), others)].min()


def test_copies_of_a_query_are_no_neighbours():
    inside = with_images("photos")
    inside.embedding[1::2] = inside.embedding[::2]
    _, told = retrieval_strips(inside, 0)
    for one in told["queries"]:
        assert one["query"] // 2 not in [row // 2 for row in one["neighbours"]]


def test_without_posteriors_there_are_neighbours_but_no_sets(report):
    inside = with_images("photos")
    inside.concentration = None
    _, told, html = report(inside)
    check_page(html)
    assert {one["set_size"] for one in told["figures"]["neighbours"]["queries"]} == {None}
    assert "credible set" not in html
    assert retrieval_strips(with_images("few", 20), 0) == ([], None)


def test_pages_of_many_large_images_stay_small(report):
    """Noise cannot be compressed: the worst case for thumbnails."""
    given = [with_images(name, 60, k, size=200, noise=True) for k, name in enumerate(("photos", "textures"))]
    for one in given:
        one.scores = {f"score {k}": np.random.default_rng(k).permutation(60) / 60 for k in range(12)}
    _, _, html = report(*given)
    page = check_page(html)
    pictures = [base64.b64decode(one["src"].split(",")[1]) for one in page.all("img")]
    assert len(pictures) == 6 * 3 * 10 + 6 * 9
    assert max(map(len, pictures)) <= BYTES
    assert {max(Image.open(io.BytesIO(one)).size) for one in pictures} == {SIDE}
    assert len(html) < 3_000_000


def test_every_column_has_its_words_and_directions_agree(report):
    results, _, _ = report(*sets())
    for _, table in results.tables:
        for metric in table.metrics:
            assert words(metric).meaning, metric
    for module, names in (
        (ood, (*OodMetrics.NAMES, "scod_auroc", "scod_aurc")),
        (calibration, calibration.NAMES),
        (selective, ("aurc", "excess_aurc", "augrc", "error_auroc", "accuracy_at_80%")),
        (retrieval, ("r_auroc", "ausc", "aurc", "excess_aurc", "lam_ausc")),
    ):
        for name in names:
            assert words(name).better == ("lower" if name in module.LOWER else "higher"), name
    assert words("recall_at_5").label == "recall@5"
    assert words("some_thing") == type(words("x"))("some thing")


def test_tables_survive_the_file():
    cells = {
        "a": {"m": Cell(Interval(0.1, 0.05, 0.2)), "n": Cell(Interval(1, 0, 2), Interval(0.5, 0.1, 0.9), True, 0.25)},
        "b": {"n": Cell(Interval(-1.0, -2.0, 0.0), Interval(-0.5, -1, 0.1))},
    }
    table = Table("t", ("m", "n"), cells, ("one", "two"), {"set": "s", "seed": 4})
    again = table_from_dict(json.loads(table.json()))
    assert again == table
    assert again.markdown() == table.markdown()


def test_reports_can_be_gathered_again(report, tmp_path):
    first, _, _ = report(*sets())
    (tmp_path / "old.json").write_text(first.json())
    second, told, html = report(runs=[tmp_path / "old.json"])
    assert [table.cells for _, table in second.tables] == [table.cells for _, table in first.tables]
    assert {source for source, _ in second.tables} == {"old.json"}
    assert told["figures"] == {}
    assert "old.json" in check_page(html).words()
    assert (tmp_path / "out/results.md").read_text() == first.markdown()


GOOD = {"title": "t", "notes": [], "scores": {"a": {"m": {"value": 0.5, "low": 0.4, "high": 0.6}}}}


def bad(**changes):
    return [{**GOOD, **changes}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no table"),
        ("3", "no list of tables"),
        ("[3]", "no list of tables"),
        ('{"a": 1, "b": 2}', "of another origin (its keys: a, b)"),
        (
            {"kind": "posthoc report", "schema_version": 2, "tables": bad()},
            "has schema version 2; this posthoc reads version 1",
        ),
        ({"kind": "posthoc report", "schema_version": 1}, "no list of tables"),
        (bad(title=3), "lacks a title or scores"),
        (bad(scores={}), "lacks a title or scores"),
        (bad(notes=[1]), "notes must be a list of sentences"),
        (bad(scores={"a": 3}), "the row 'a' must map metrics to values"),
        (bad(scores={"a": {"m": 0.5}}), "m of a must have value, low and high; it is 0.5"),
        (bad(scores={"a": {"m": {"value": 1, "low": 0}}}), "m of a: high must be a finite number, not None"),
        (
            bad(scores={"a": {"m": {"value": float("nan"), "low": 0, "high": 1}}}),
            "value must be a finite number, not nan",
        ),
        (bad(scores={"a": {"m": {"value": True, "low": 0, "high": 1}}}), "value must be a finite number, not True"),
        (bad(scores={"a": {"m": {"value": 1, "low": 0, "high": 1, "better": 1}}}), "better must be true or false"),
        (bad(scores={"a": {"m": {"value": 1, "low": 0, "high": 1, "spread": "x"}}}), "spread must be a finite number"),
        (
            bad(scores={"a": {"m": {"value": 1, "low": 0, "high": 1, "minus_reference": 1}}}),
            "difference must have value",
        ),
    ],
)
def test_runs_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=r"^[^\n]*$") as error:
        write_report(tmp_path / "out", [tmp_path / "run.json"])
    assert message in str(error.value)
    assert str(tmp_path / "run.json") in str(error.value)
    assert not (tmp_path / "out/index.html").exists()


def test_what_is_refused(tmp_path):
    inside, outside = sets()
    with pytest.raises(OptionError, match="nothing to report"):
        write_report(tmp_path / "out")
    with pytest.raises(OptionError, match="without ID images"):
        write_report(tmp_path / "out", [tmp_path], None, [outside])
    with pytest.raises(DataError, match="there is no file"):
        write_report(tmp_path / "out", [tmp_path / "none.json"])
    with pytest.raises(OptionError, match="two sets are called photos"):
        write_report(tmp_path / "out", [], inside, [inside])
    with pytest.raises(DataError, match="no score that all sets have"):
        write_report(tmp_path / "out", [], Scored("a", {"u": np.arange(3.0)}), [Scored("b", {"v": np.arange(3.0)})])
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"cannot write a report to .*file"):
        write_report(tmp_path / "file", [], inside)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="not JSON compliant"):
        Results((), figures={"x": float("nan")}).json()


def test_scores_alone_are_enough(report):
    """A score file of another's method: no labels, no logits."""
    rng = np.random.default_rng(0)
    inside, outside = (Scored(name, {"u": rng.normal(size=50) + k}) for k, name in enumerate(("a", "b")))
    results, told, html = report(inside, outside)
    assert [table.title for _, table in results.tables] == ["b"]
    assert set(told["figures"]) == {"histograms"}
    check_page(html)
    assert "Calibration" not in html


def test_labels_that_cannot_be_the_classifiers_bring_neither_calibration_nor_mistakes(report):
    inside, outside = sets()
    never = (np.asarray(inside.logits).argmax(1) + 1) % 4
    results, told, _ = report(Scored("photos", {"u": inside.scores["mine"]}, never, logits=inside.logits), outside)
    (table,) = [table for _, table in results.tables]
    assert "no scod: the classifier is never right on photos; are these labels its classes?" in table.notes
    assert set(told["figures"]) == {"histograms"}


def test_the_command(tmp_path, capsys):
    for name, shift in (("photos", 0.0), ("textures", 1.0)):
        np.savez(tmp_path / f"{name}.npz", **arrays(seed=int(shift), shift=shift))
    run = tmp_path / "run.json"
    run.write_text(json.dumps([GOOD]))
    given = ["--id", str(tmp_path / "photos.npz"), "--ood", str(tmp_path / "textures.npz"), "--resamples", "20"]
    main(["eval", "report", str(run), "--output", str(tmp_path / "out"), "--seed", "7", *given])
    told = capsys.readouterr()
    assert told.out.startswith("t\nscore")
    assert f"are in {tmp_path / 'out'}" in told.err
    written = json.loads((tmp_path / "out/results.json").read_text())
    words = written["made"]["command"]
    assert words[:4] == ["posthoc", "eval", "report", str(run)]
    main([*words[1:], "--output", str(tmp_path / "again")])
    capsys.readouterr()
    assert (tmp_path / "again/index.html").read_bytes() == (tmp_path / "out/index.html").read_bytes()
    for arguments, message in (
        (["--ood", given[1]], "--ood was given without --id"),
        (["--held-out", given[1]], "--held-out was given without --id"),
        ([], "nothing to report"),
        ([str(tmp_path / "none.json")], "there is no file"),
    ):
        with pytest.raises(SystemExit):
            main(["eval", "report", "--output", str(tmp_path / "out"), *arguments])
        assert message in capsys.readouterr().err


def test_held_out_images_bring_scalings(report):
    inside, outside = sets()
    kept = from_arrays("kept", arrays(120, seed=9))
    results, _, _ = report(inside, outside, held_out=kept)
    rows = {name for _, table in results.tables for name in table.cells}
    assert {"temperature", "vector", "isotonic", "temperature-scaled softmax"} <= rows
    with pytest.raises(PosthocError, match="held-out"):
        report(inside, outside, held_out=from_arrays("kept", arrays()))


def test_drawings_follow_the_page():
    def draw(figure):
        axis = figure.subplots()
        best_possible(axis, np.arange(3), np.arange(3))
        axis.plot([0, 1], color=COLOURS[1], clip_on=True)
        axis.set_title("$a_ <b> & c")

    first = svg.svg(draw, 3, 2, name="one", alt='a "b" <c>')
    assert first == svg.svg(draw, 3, 2, name="one", alt='a "b" <c>')
    page = Page(first)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert ids
    assert all(one.startswith("one-") for one in ids)
    assert not set(ids) & set(re.findall(r'id="([^"]*)"', svg.svg(draw, 3, 2, name="two", alt="x")))
    assert "var(--c1, #d55e00)" in first
    assert "var(--faint, #d9d9d9)" in first
    assert {"metadata", "style"}.isdisjoint(tag for tag, _ in page.elements)
    assert "$a_ <b> & c" in page.words()
    assert page.elements[0][1]["aria-label"] == 'a "b" <c>'
    assert svg.variable("#123456") == "#123456"


def test_the_page_of_the_documentation_is_right(tmp_path, monkeypatch, capsys):
    docs = Path(__file__).resolve().parents[2] / "docs/report.md"
    if not docs.is_file():
        pytest.skip("needs the folder docs, which is not beside these tests")
    text = docs.read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {})
    told = json.loads((tmp_path / "report/results.json").read_text())
    value = first = told["tables"][0]["scores"]["my score"]["auroc"]
    assert capsys.readouterr().out == f"{Interval(value['value'], value['low'], value['high'])!r}\n"
    check_page((tmp_path / "report/index.html").read_text())
    for key in (*told, *told["figures"], "source", "title", "notes", "scores", *first):
        assert f"`{key}" in text, key
