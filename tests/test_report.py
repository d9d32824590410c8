"""The report: one page that loads nothing, says what it left out, and shows the numbers it was given."""

import base64
import html.parser
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from codebind_jax.evaluators import contents
from codebind_jax.evaluators.intervals import wilson_interval
from codebind_jax.report import charts, summary
from codebind_jax.report import data as report_data
from codebind_jax.report import page as report
from codebind_jax.report.data import Attribution, EmbeddingMap, Gallery, Item, Query, ReportData, Run, Score

VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
  """Parses a page, checks that tags close, and keeps elements, ids, links and text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements, self.text, self.balanced = [], [], [], True
    self.feed(text)
    self.balanced &= not self.open

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    self.balanced &= bool(self.open) and self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.text.append(data)

  def all(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]


def picture(value, side=120):
  return np.full((side, side, 3), value, np.uint8)


def full():
  rng = np.random.default_rng(0)
  steps = range(10, 1210, 10)
  records = [
    {
      "step": s,
      "stage": "stage1" if s < 600 else "stage2",
      "train/info_nce": 1000.0 / s**2,
      "train/cmcm": 5.0 - s / 1000,
    }
    | {"codebook/shared/perplexity": 400.0 + s / 10, "codebook/shared/active_share": 1.0, "codebook/shared/dead": 0.0}
    for s in steps
  ]
  records[7]["train/cmcm"] = float("nan")
  records += [{"step": s, "stage": "stage2", "eval/val/zeroshot/image/top1": s / 20} for s in (400, 1200)]
  points = {"image": rng.normal(size=(30, 2)), "text": rng.normal(size=(10, 2))}
  return ReportData(
    title="Stage 1 & <bridges>",
    run=Run("CodeBind", records),
    baseline=Run("plain InfoNCE", [{"step": s, "stage": "stage1", "train/info_nce": 1100.0 / s} for s in steps]),
    verdict=["Zero-shot: level with <the> baseline (difference 2.2 points, within the 95 % interval)."],
    trained="CodeBind learned to bind image with text.",
    command="python -m codebind_jax.main --config='a b'",
    config={"seed": 0, "model": {"width": 1024, "codes": {"shared": 512}}, "empty": {}},
    environment={"jax": "0.10.2"},
    seconds={"data": 184.2, "training": 12.34},
    data_profile="small",
    data_counts={"train": 3587},
    scores=[
      Score("Zero-shot top-1", "artists", 61.4, 59.2, 0.2, wilson_interval(61.4, 1400)),
      Score("Zero-shot top-1", "concepts", 25.0, 15.0, 0.8, wilson_interval(25.0, 1126)),
      Score("Median rank", "artists", 14.0, 19.0, unit="", higher_is_better=False),
    ],
    codebook_sizes={"shared": 512},
    code_counts={"shared": np.append(np.arange(511), 0)},
    shared_counts={"image": np.array([3, 1, 0, 0]), "depth": np.array([0, 2, 2, 0])},
    galleries=[
      Gallery("Text to image", "icons, unseen artists", [
        Query(Item("a cat"), [Item("cat", picture(0), True, 0.5), Item("dog", picture(9), False, -0.25)])], 40, 30, 12),
      Gallery("Image to text", "icons, unseen artists", [
        Query(Item("cat", picture(3)), [Item("a dog", None, False, 0.4)])], 30, 40, 0, "texts"),
      Gallery("Text to audio", "mine, validation rows held out", [
        Query(Item("barking"), [Item("dog", picture(5), False, 0.1, "spectrogram of a sound")])], 1_200, 30, 600),
    ],
    maps=[EmbeddingMap("Before training", points, np.array([[0, 1], [29, 9]]), "PCA.")],
    attributions=[Attribution("noto", "Apache-2.0", "Google Inc")],
  )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  path = report.write_report(tmp_path_factory.mktemp("report") / "report.html", full())
  return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_loads_nothing(page):
  parsed = Page(page)
  assert parsed.balanced
  assert not re.search(r"https?:|//[a-z]|@import|<link|<script|srcset", page)
  assert all(image["src"].startswith("data:image/") for image in parsed.all("img"))
  ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
  assert len(ids) == len(set(ids))
  inner = [attributes[name] for _, attributes in parsed.elements for name in ("href",) if name in attributes]
  assert {link.removeprefix("#") for link in inner} <= set(ids)
  assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
  assert len(page) < 400_000


def test_page_can_be_read_without_seeing_it(page):
  parsed = Page(page)
  assert parsed.all("html")[0]["lang"] == "en" and parsed.all("meta")[1]["name"] == "viewport"
  assert [len(parsed.all(f"h{level}")) > 0 for level in (1, 2, 3)] == [True] * 3 and len(parsed.all("h1")) == 1
  assert all(image["alt"] for image in parsed.all("img"))
  for svg in parsed.all("svg"):
    assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and len(svg["aria-label"]) > 10)
  assert all(cell.get("scope") in ("row", "col") for cell in parsed.all("th"))
  # Right and wrong in words and signs, not by colour alone.
  text = " ".join(parsed.text)
  assert text.count("✓ right") == 1 and text.count("✗ wrong") == 3
  assert [image["alt"] for image in parsed.all("img")] == ["cat", "dog", "cat", "spectrogram of a sound: dog"]
  # Dark and print are looked after.
  assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_page_shows_what_it_was_given(page):
  text = re.sub(r"\s+", " ", " ".join(Page(page).text))  # no-break blanks too
  for expected in [
    "Stage 1 & <bridges>", "python -m codebind_jax.main --config='a b'", "model.codes.shared", "3 min 04 s", "12.3 s",
    "3 min 17 s", "3,587", "Apache-2.0", "1 of 120 values not finite", "512 codes, 2 never used", "shared (512 codes)",
    "half the codes", "stage2", "level with <the> baseline (difference 2.2 points, within the 95 % interval).",
    "12 of 40 queries (30 %) have a right first answer among 30 pictures.", "600 of 1,200 queries (50 %)",
    "Before training", "−0.25", "val · zeroshot · image · top1",
    "33.3 % of the shared codes in use", "serves 1.3 of 2 in effect", "depth 50.0 2",
  ]:  # fmt: skip
    assert expected in text, expected
  assert "Left out" not in text and "<bridges>" not in page
  assert "train info_nce; CodeBind from 10 to 0.0006944 at step 1,200" in page
  assert "plain InfoNCE from 110 to 0.9167 at step 1,200" in page


def rows(page):
  """Cells of all table rows as text."""
  found = re.findall(r"<tr[^>]*>(.*?)</tr>", page, flags=re.S)
  return [[re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in found]


def test_score_table(page):
  table = {" ".join(row[0]): row[1:] for row in rows(page) if row[1:]}
  assert table["concepts"][:4] == [["25.0", "22.6–27.6"], ["15.0"], ["+10.0", "▲"], ["0.8"]]
  # The mean: 43.2 against 37.1, halves of the intervals joined as independent.
  half = [
    np.hypot(*[abs(v - wilson_interval(v, n)[end]) for v, n in ((61.4, 1400), (25.0, 1126))]) / 2 for end in (0, 1)
  ]
  interval = f"{43.2 - half[0]:.1f}–{43.2 + half[1]:.1f}"
  assert table["mean of 2 sets"][:4] == [["43.2", interval], ["37.1"], ["+6.1", "▲"], ["0.5"]]
  # The baseline 59.2 lies inside 58.8-63.9: no arrow. A lower rank is better: down, and good.
  artists = [row[1:] for row in rows(page) if row[0] == ["artists"]]
  assert artists[0][2] == ["+2.2", "≈"] and artists[1][2] == ["−5.0", "▼"]
  assert '<span class="up">−5.0 ▼</span>' in page and '<span class="even">+2.2 ≈</span>' in page


def test_missing_parts_are_named(tmp_path):
  path = report.write_report(tmp_path / "r.html", ReportData("Evaluation", Run("model", []), command="run"))
  text = " ".join(Page(path.read_text()).text)
  left_out = "Queries and what was found, Results, Training curves, Validation during training, Codebook usage"
  assert f"Left out for lack of data: {left_out}" in text
  assert "What was run" in text and [file.name for file in tmp_path.iterdir()] == ["r.html"]


def test_no_baseline_no_column(tmp_path):
  scores = [Score("Top-1", "mine", 50.0), Score("Top-1", "yours", float("nan"))]
  path = report.write_report(tmp_path / "r.html", ReportData("Evaluation", Run("model", []), scores=scores))
  assert rows(path.read_text())[0] == [["Set"], ["model"], ["0", "to", "100", "%"]]
  assert rows(path.read_text())[2][:2] == [["yours"], ["–"]]


def test_gallery_images_are_small_and_true(page):
  sources = [image["src"] for image in Page(page).all("img")]
  decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))).convert("RGB")) for s in sources]
  assert [image.shape for image in decoded] == [(96, 96, 3)] * 4
  assert [int(image.mean().round()) for image in decoded] == [0, 9, 3, 5]


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(code_counts={"shared": np.zeros(4)}), r"code_counts\['shared'\]"),
    (dict(galleries=[Gallery("T", "s", [Query(Item("q"), [Item("x", np.zeros((4, 4, 4), np.uint8), True)])], 1, 1, 1)]),
     "gallery image 'x'"),
    (dict(maps=[EmbeddingMap("m", {"a": np.array([[np.nan, 0]])}, np.zeros((0, 2), int))]), "map 'm', a"),
  ],
)
def test_malformed_parts_are_named_and_nothing_is_written(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    report.write_report(tmp_path / "r.html", ReportData("Evaluation", Run("model", []), **change))
  assert not list(tmp_path.iterdir())


# Charts.


def test_charts_are_small_themed_and_deterministic():
  x = np.arange(5000)
  draw = lambda: charts.line_chart(
    "train-loss", [charts.Line("a", x, np.sin(x / 500))], marks={"half": 0.5}, breaks={"s": 9.0}
  )
  svg = draw()
  assert svg == draw() and len(svg) < 15_000
  root = ElementTree.fromstring(svg)
  assert "width" not in root.attrib and "viewBox" in root.attrib
  assert "#01" not in svg and {"var(--c1)", "var(--muted)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", svg))
  assert not re.findall(r"#[0-9a-f]{6}", svg)
  with pytest.raises(ValueError, match="chart 'x': no finite value"):
    charts.line_chart("x", [charts.Line("a", x, np.full(5000, np.nan))])


def test_thinning_keeps_means_and_gaps():
  x, y = charts._thin(np.arange(800.0), np.concatenate([np.full(400, 2.0), np.full(200, np.nan), np.full(200, 3.0)]))
  assert len(x) == 400 and x[0] == 0.5 and x[-1] == 798.5
  assert (y[:200] == 2).all() and np.isnan(y[200:300]).all() and (y[300:] == 3).all()


def test_tick_labels_are_not_cut():
  svg = charts.line_chart("small", [charts.Line("a", np.arange(3.0), np.array([0.025, 0.0751, 0.1]))])
  assert {"0.025", "0.05", "0.075", "0.1"} <= set(re.findall(r">([^<]+)</text>", svg))


# Builders.


def sides(asked, found):
  """Both sides of a gallery, from one value of each row."""
  keys = [(np.arange(len(values)), np.array(list(values))) for values in (asked, found)]
  return contents.sides(tuple(np.arange(len(values)) for values in (asked, found)), tuple(keys))


def test_a_gallery_shows_queries_with_right_and_with_wrong_first_answers_and_counts_all():
  found = [Item("north"), Item("east"), Item("also north")]
  embeddings = np.array([[0, 2], [1, 0], [0.1, 1]], np.float32)
  asked = [Item(f"up {i}") for i in range(9)] + [Item("right")]
  queries = np.array([[0, 1]] * 9 + [[0, 1]], np.float32)  # the last asks for east and gets north
  made = report_data.build_gallery("T", "mine", asked, queries, found, embeddings,
                                   relevant=sides(["n"] * 9 + ["e"], ["n", "e", "n"]), shown=4, k=2)  # fmt: skip
  assert (made.asked, made.found, made.first, made.on) == (10, 3, 9, "mine")
  # One is wrong, so three right ones are shown, spread over all.
  assert [query.asked.text for query in made.queries] == ["up 0", "up 4", "up 8", "right"]
  first, last = made.queries[0].answers, made.queries[-1].answers
  assert [(answer.text, answer.right) for answer in first] == [("north", True), ("also north", True)]
  assert [(answer.text, answer.right) for answer in last] == [("north", False), ("also north", False)]
  assert first[0].score == pytest.approx(1.0) and first[1].score == pytest.approx(1 / np.sqrt(1.01))
  with pytest.raises(ValueError, match="lengths must be equal"):
    report_data.build_gallery("T", "", asked[:1], queries[:1], found, embeddings, relevant=sides("nn", "nen"))


def test_right_and_wrong_queries_are_shown_in_equal_number_as_far_as_there_are():
  right = np.array([True] * 6 + [False] * 6)
  assert report_data.balanced(right, 4) == [0, 5, 6, 11]
  assert report_data.balanced(right, 3) == [0, 5, 6]
  assert report_data.balanced(np.ones(3, bool), 4) == [0, 1, 2] and report_data.balanced(np.zeros(3, bool), 2) == [0, 2]
  assert report_data.balanced(np.array([False, True]), 9) == [0, 1]


def test_scores_take_rows_ways_interval_and_chance_from_the_metrics():
  found = {
    "eval/a/zeroshot/image/top1": 50.0, "eval/a/zeroshot/image/top1/n": 756.0, "eval/a/zeroshot/image/top1/ways": 6.0,
    "eval/a/zeroshot/image/top1/low": 30.0, "eval/a/zeroshot/image/top1/high": 70.0,
    "eval/b/zeroshot/image/top1": 20.0, "eval/a/retrieval/text_to_image/r5": 10.0,
  }  # fmt: skip
  base = {"eval/a/zeroshot/image/top1": 40.0, "eval/a/zeroshot/image/top1/low": 20.0}  # one end is no interval
  made = report_data.scores_from_metrics(
    found, base, metrics={"zeroshot/image/top1": "Top-1", "retrieval/text_to_image/r5": "R@5"},
    sets={"a": "set A", "b": "set B"}, differences={"eval/a/zeroshot/image/top1": (4.0, 16.0)},
  )  # fmt: skip
  assert made == [
    Score("Top-1", "set A", 50.0, 40.0, 100.0 * 1 / 6.0, (30.0, 70.0), n=756, ways=6, difference=(4.0, 16.0),
          family="Zero-shot", subject="image"),
    Score("Top-1", "set B", 20.0, family="Zero-shot", subject="image"),
    Score("R@5", "set A", 10.0, family="Retrieval", subject="text to image"),
  ]  # fmt: skip
  assert report_data.scores_from_metrics(found, metrics={"top5": "Top-5"}, sets={"a": "A"}) == []


@pytest.mark.parametrize(
  "name, about, chance",
  [
    ("zeroshot/image/top1", {"ways": 550}, 100 / 550),
    ("zeroshot/image/top5", {"ways": 20}, 25.0),
    ("zeroshot/image/top5", {"ways": 3}, 100.0),
    ("zeroshot/image/balanced", {"ways": 4}, 25.0),
    ("probe/family/image/shared", {"n": 756, "ways": 6}, 100 / 6),
    ("probe/family/image/shared/balanced", {"ways": 6}, 100 / 6),
    ("retrieval/image_to_text/r5", {"n": 300, "ways": 100}, 5.0),
    ("retrieval/text_to_image/r5", {"n": 100, "ways": 300}, None),  # several pictures answer a text
    ("zeroshot/image/top1", {}, None),
  ],
)
def test_chance_is_that_of_a_guess_among_the_candidates(name, about, chance):
  measured = {f"eval/s/{name}": 1.0} | {f"eval/s/{name}/{end}": float(value) for end, value in about.items()}
  assert report_data.chance_of(f"eval/s/{name}", measured) == (None if chance is None else pytest.approx(chance))


def test_emergent_retrieval_has_the_chance_that_was_measured():
  measured = {"eval/test/emergent/a_to_b/r5": 9.0, "eval/test/emergent/a_to_b/chance5": 7.0}
  assert report_data.chance_of("eval/test/emergent/a_to_b/r5", measured) == 7.0


def test_recall_at_five_of_few_contents_is_left_out_for_recall_at_one():
  """Of nine contents a guess finds the right one among five more often than not."""
  of = lambda name, ways: {f"eval/{name}/retrieval/text_to_image/r{k}{end}": float(value) for k in (1, 5)
                           for end, value in (("", 10 * k), ("/n", 30), ("/ways", ways))}  # fmt: skip
  found = summary._telling(of("few", 9) | of("many", 25) | {"eval/few/zeroshot/image/top5": 3.0})
  assert {name for name in found if name.endswith(("r1", "r5", "top5"))} == {
    "eval/few/retrieval/text_to_image/r1", "eval/many/retrieval/text_to_image/r5", "eval/few/zeroshot/image/top5"
  }  # fmt: skip


def test_only_rows_of_as_many_ways_have_a_mean():
  rows = [Score("Top-1", "a", 60.0, 50.0, 10.0, (50.0, 70.0), ways=10, baseline_interval=(40.0, 60.0)),
          Score("Top-1", "b", 40.0, 40.0, 10.0, (30.0, 50.0), ways=10, baseline_interval=(30.0, 50.0))]  # fmt: skip
  mean = report.mean_of(rows)
  assert (mean.on, mean.value, mean.baseline, mean.chance, mean.n) == ("mean of 2 sets", 50.0, 45.0, 10.0, None)
  assert mean.interval == pytest.approx((50 - np.hypot(10, 10) / 2, 50 + np.hypot(10, 10) / 2))
  # Each difference has sqrt(10^2 + 10^2) to either side, their mean sqrt(2 * 200) / 2 = 10.
  assert mean.difference == pytest.approx((-5.0, 15.0))
  other = Score("Top-1", "c", 10.0, ways=120)
  assert report.mean_of([*rows, other]) is None and report.mean_of(rows[:1]) is None
  assert report.mean_of([rows[0], Score("Top-1", "d", float("nan"), ways=10)]) is None


def test_a_narrow_page_scrolls_tables_alone_and_breaks_no_word(page):
  assert not re.search(r"overflow-wrap: anywhere[^}]*}", page.split("pre {")[0])
  narrow = page[page.index("@media (max-width: 640px)") : page.index("@media print")]
  assert "min-width: 0" in page and "minmax(100px, 1fr)" in narrow and "overflow-x: auto" in page
  assert "\u00a0%" in page.split("<section")[0], "no line ends before a percent sign"


def test_embedding_map_separates_what_is_apart_and_says_how_near_pairs_are():
  rng = np.random.default_rng(0)
  centre = np.eye(2, 8, dtype=np.float32)
  near = lambda row: (5 * centre[row] + 0.1 * rng.normal(size=(20, 8))).astype(np.float32)
  made = report_data.embedding_map("m", {"image": near(0), "text": near(1)}, [(0, 0), (3, 1)])
  image, text = made.points["image"], made.points["text"]
  spread = max(image.std(axis=0).max(), text.std(axis=0).max())
  assert image.shape == (20, 2) and np.linalg.norm(image.mean(axis=0) - text.mean(axis=0)) > 10 * spread
  assert made.pairs.tolist() == [[0, 0], [3, 1]] and "Mean cosine of joined pairs" in made.note
  tsne = report_data.embedding_map("m", {"image": near(0), "text": near(1)}, method="tsne")
  assert np.isfinite(tsne.points["text"]).all() and tsne.points["text"].shape == (20, 2) and not len(tsne.pairs)
  with pytest.raises(ValueError, match="'pca' or 'tsne', got 'umap'"):
    report_data.embedding_map("m", {"image": near(0)}, method="umap")
