"""Pictures from files, folders, JSONL and memory; and what is said where one cannot be read."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sinklens as sl
from sinklens.core.errors import DataError, ModelError, SinklensError, UsageError
from sinklens.inputs.cutting import cut_prompt, least_length, without_pictures
from sinklens.inputs.spans import Kind
from sinklens.inputs.vision import holds_pictures, load_pictures
from sinklens.inputs.vision.answers import answer_tokens
from sinklens.inputs.vision.documents import read_documents
from sinklens.inputs.vision.masks import cell_means
from sinklens.inputs.vision.pictures import Decoded, refer, thumbnail
from tests.inputs.vision.painting import noise
from tests.vlms import build, processor

PICTURES = Path(sl.__file__).parent / "checkpoints" / "vlm-shapes" / "sinklens_pictures.jsonl"


@pytest.fixture(scope="module")
def llava():
    return processor("llava"), build("llava").config


def saved(folder, name, image, **options):
    path = folder / name
    image.save(path, **options)
    return path


def decode(item):
    return refer(item, "here").open()


# --- one picture


def test_every_mode_becomes_upright_rgb_and_says_what_was_done(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert (decode(saved(tmp_path, "l.png", Image.fromarray(grey))).pixels == grey[..., None]).all()
    rgba = np.zeros((3, 4, 4), np.uint8)
    rgba[1, 2] = (10, 20, 30, 255)
    found = decode(saved(tmp_path, "rgba.png", Image.fromarray(rgba)))
    assert found.notes == ("transparent parts laid on white",)
    assert found.pixels[0, 0].tolist() == [255, 255, 255]
    assert found.pixels[1, 2].tolist() == [10, 20, 30]
    deep = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000).astype(np.uint16)
    found = decode(saved(tmp_path, "deep.png", Image.fromarray(deep)))
    assert found.notes == ("16 bits cut to their upper 8",)
    assert (found.pixels[..., 0] == deep >> 8).all()
    palette = Image.fromarray(noise(5, 7)).quantize(8)
    assert (decode(saved(tmp_path, "p.png", palette)).pixels == np.asarray(palette.convert("RGB"))).all()
    assert decode(saved(tmp_path, "one.png", Image.new("1", (3, 2), 1))).pixels.min() == 255
    assert decode(Image.new("CMYK", (3, 2))).pixels.shape == (2, 3, 3)


def test_exif_rotation_and_first_frames(tmp_path):
    pixels = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(saved(tmp_path, "turned.png", Image.fromarray(pixels), exif=exif))
    assert (turned.pixels == np.rot90(pixels, -1)).all()
    assert turned.notes == ("turned upright as its EXIF data says",)
    frames = [Image.new("RGB", (5, 4), (shade, 0, 0)) for shade in (10, 200)]
    moving = decode(saved(tmp_path, "m.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert moving.notes == ("only the first of 2 frames",)
    assert moving.pixels[0, 0, 0] == 10


def test_arrays_in_memory():
    pixels = noise(4, 6)
    for array in (pixels, pixels.transpose(2, 0, 1), pixels.astype(np.int64), pixels / 255.0):
        assert (decode(array).pixels == pixels).all()
    assert decode(pixels[..., 0]).pixels.shape == (4, 6, 3)
    assert decode(pixels[..., :1] > 40).pixels.max() == 255
    for bad in (
        pixels.astype(float),
        np.full((4, 6, 3), np.nan),
        np.zeros((5, 6, 2)),
        np.zeros((0, 6, 3)),
        pixels.astype(int) - 300,
    ):
        with pytest.raises(DataError):
            decode(bad)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("text.png", b"not a picture at all", "not a picture that Pillow knows"),
        ("empty.jpg", b"", "0 bytes"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\x00\x00", "is damaged: it ends before its header does"),
        ("film.mp4", b"x", "is a video"),
    ],
)
def test_files_that_are_no_pictures(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        decode(tmp_path / name)


def test_a_damaged_picture_an_address_and_a_missing_file(tmp_path):
    path = saved(tmp_path, "a.png", Image.fromarray(noise(40, 40)))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match="damaged"):
        decode(path)
    for address in ("https://example.org/cat.png", "data:image/png;base64,AAAA", "s3://bucket/cat.png"):
        with pytest.raises(DataError, match="never from the network"):
            refer(address, "here")
    with pytest.raises(DataError, match="does not exist"):
        refer(str(tmp_path / "none.png"), "here")


def test_thumbnails_and_hashes():
    large = Decoded("large", noise(300, 1200))
    assert thumbnail(large).shape == (112, 448, 3)
    small = Decoded("small", noise(9, 7))
    assert (thumbnail(small) == small.pixels).all()
    assert small.picture.sha256 == Decoded("other", noise(9, 7)).picture.sha256
    flat = np.zeros((4, 9, 3), np.uint8)
    assert Decoded("a", flat).picture.sha256 != Decoded("a", flat.reshape(9, 4, 3)).picture.sha256


# --- sources


def test_a_folder_in_order_of_names_without_its_other_files(tmp_path):
    for name in ("b.png", "a.jpg", "c.webp"):
        Image.fromarray(noise(9, 9)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    found = read_documents(str(tmp_path), None, "what ?")
    assert [document.source for document in found.documents] == ["a.jpg", "b.png", "c.webp"]
    assert [document.content for document in found.documents] == ["what ?"] * 3
    assert "1 files" in found.notes[0]
    assert str(tmp_path.parent) not in found.name


def test_folders_without_pictures(tmp_path):
    with pytest.raises(DataError, match="It is empty"):
        read_documents(str(tmp_path), None, None)
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match="videos"):
        read_documents(str(tmp_path), None, None)


def jsonl(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_jsonl_lines(tmp_path, llava):
    for name in ("a.png", "b.png"):
        Image.fromarray(noise(30, 50)).save(tmp_path / name)
    mask = np.zeros((30, 50), bool)
    mask[:, :25] = True
    Image.fromarray(mask).save(tmp_path / "m.png")
    path = jsonl(
        tmp_path,
        {"image": "a.png", "question": "how many ?", "answer": "two", "mask": "m.png", "domain": "dogs"},
        {"images": ["a.png", "b.png"], "text": "<image> and <image> ?"},
    )
    assert holds_pictures(path)
    prompts = load_pictures(None, *llava, prompts=path)
    first, second = prompts.prompts
    assert (first.source, first.domain, first.visual.answer) == ("rows.jsonl:1", "dogs", "two")
    assert first.visual.question == "how many ?"
    assert "two" not in "".join(first.pieces)
    # The left half of the picture shows the object; the crop keeps the middle 30 of its 50 columns.
    assert first.visual.objects[first.visual.spans.grids[0].positions][0] == pytest.approx(
        [1, 1, 0.5, 0, 0], abs=0.02
    )
    assert len(second.visual.spans.pictures) == 2
    assert second.visual.objects is None
    between = "".join(second.pieces).replace("<image>", "")
    assert between == "<bos> and  ?"
    assert prompts.description["pictures"]["n"] == 3
    assert prompts.description["source"] == "rows.jsonl"


@pytest.mark.parametrize(
    ("text", "answer", "marked"),
    [
        ("how many ? two cats, two dogs", "two dogs", "two dogs"),  # the last of two places that begin alike
        ("how many ? two", "two", "two"),
        ("how many ? two\n", " two ", "two"),
        ("how many ? two", "three", ""),
        ("how many ? two", None, ""),
        ("how many ? two", "  ", ""),
    ],
)
def test_an_answer_at_the_end_of_a_text_is_marked(tmp_path, llava, text, answer, marked):
    Image.fromarray(noise(30, 50)).save(tmp_path / "a.png")
    path = jsonl(tmp_path, {"image": "a.png", "text": text, "answer": answer})
    (prompt,) = load_pictures(None, *llava, prompts=path).prompts
    places = prompt.visual.spans.is_(Kind.GENERATED).nonzero()[0]
    assert "".join(prompt.pieces[place] for place in places).strip() == marked
    if marked:
        assert places.tolist() == list(range(places[0], places[-1] + 1))
        assert (prompt.visual.spans.kinds[places[-1] + 1 :] == Kind.QUESTION).all()


def test_an_answer_whose_first_token_holds_more_than_the_answer_is_not_marked():
    def joined(text, **_):
        return {"input_ids": [1, 2] if text.endswith("ab") else [7]}

    assert answer_tokens(joined, (0, 1, 2), "aab", "ab") is None


def test_the_bundled_pictures_end_with_their_answers():
    prepared = sl.profile("bundled:vlm-shapes", n=3, analyzers=["visual-tokens"], verify=False)
    rows = json.loads("[" + ",".join(PICTURES.read_text().splitlines()) + "]")
    for record in prepared.trace:
        said = [record.pieces[at] for at in record.spans.is_(Kind.GENERATED).nonzero()[0]]
        row = next(row for row in rows if f"{row['image']}".endswith(record.spans.pictures[0].name))
        assert [piece.strip() for piece in said] == row["answer"].split()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"image": ', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"question": "what ?"}, "rows.jsonl:1 has no picture"),
        ({"imag": "a.png", "image": None}, "has no picture"),
        ({"image": "none.png"}, "does not exist"),
        ({"image": "a.png", "text": "no <image> and <image>"}, "2 placeholders"),
        ({"image": "a.png", "mask": ["a.png", "a.png"]}, "1 pictures and 2 masks"),
        ({"image": "a.png", "mask": "small.png"}, "mask 'small.png' has 5 x 5 pixels"),
        ({"image": "https://example.org/a.png"}, "never from the network"),
        ({"image": "a.png", "text": 5}, "not text"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, llava, row, says):
    Image.fromarray(noise(30, 50)).save(tmp_path / "a.png")
    Image.fromarray(noise(5, 5)).save(tmp_path / "small.png")
    path = jsonl(tmp_path, row)
    with pytest.raises(DataError, match=says):
        load_pictures(path, *llava)


def test_chat_messages_need_the_template_and_hold_pictures_or_their_places(tmp_path, llava):
    path = tmp_path / "a.png"
    Image.fromarray(noise(30, 50)).save(path)
    parts = [
        {"type": "text", "text": "see "},
        {"type": "image", "image": str(path)},
        {"type": "text", "text": " ?"},
    ]
    chat = [{"role": "user", "content": parts}]
    assert holds_pictures([chat])
    with pytest.raises(DataError, match="only through a chat template"):
        load_pictures([chat], *llava)
    (prompt,) = load_pictures([chat], *llava, chat_template=True).prompts
    text = "".join(prompt.pieces)
    assert text.startswith("<bos><|im_start|>user\nsee <image><image>")
    assert text.endswith("<image> ?<|im_end|>\n")
    assert prompt.visual.spans.kinds[:5].tolist() == [Kind.SYSTEM] * 5
    places = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    (other,) = load_pictures(
        [{"messages": places, "images": [str(path)]}], *llava, chat_template=True
    ).prompts
    assert len(other.visual.spans.pictures) == 1
    video = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    with pytest.raises(DataError, match="a video"):
        load_pictures([{"messages": video, "image": str(path)}], *llava, chat_template=True)


def test_pictures_in_memory(llava):
    pictures = [noise(30, 50), Image.fromarray(noise(20, 20)), [noise(9, 9), noise(8, 30)]]
    prompts = load_pictures(pictures, *llava, question="what ?").prompts
    assert [len(prompt.visual.spans.pictures) for prompt in prompts] == [1, 1, 2]
    assert [prompt.source for prompt in prompts] == ["memory#0", "memory#1", "memory#2"]
    (single,) = load_pictures(noise(30, 50), *llava).prompts
    assert len(single) == 26
    for bad, error in (([], DataError), ([[]], DataError), ([5], UsageError), ([object()], DataError)):
        with pytest.raises(error):
            load_pictures(bad, *llava)


# --- the rest of the options


def test_cutting_never_cuts_a_picture(llava):
    (prompt,) = load_pictures([noise(30, 50)], *llava, question="how many things are there ?").prompts
    assert least_length(prompt) == 26
    (cut,) = load_pictures(
        [noise(30, 50)], *llava, question="how many things are there ?", seq_len=28
    ).prompts
    assert cut.token_ids == prompt.token_ids[:28]
    assert len(cut.visual.spans.kinds) == 28
    with pytest.raises(DataError, match="--seq-len 26 or more"):
        load_pictures([noise(30, 50)], *llava, seq_len=12)
    assert len(cut_prompt(prompt, 3)) == 26
    text = without_pictures(prompt, 4)
    assert text.visual is None
    assert text.token_ids == (prompt.token_ids[0], *prompt.token_ids[26:29])


def test_inputs_per_token_are_cut_with_the_prompt():
    model = build("gemma3")
    (prompt,) = load_pictures(
        [noise(30, 50)], processor("gemma3"), model.config, question="how many ?"
    ).prompts
    cut = cut_prompt(prompt, 13)
    assert cut.visual.inputs["token_type_ids"].shape == (1, 13)
    assert cut.visual.inputs["pixel_values"].shape == prompt.visual.inputs["pixel_values"].shape


@pytest.mark.parametrize("bos", ["on", "off"])
def test_bos_policies_move_inputs_per_token_along(bos):
    made, config = processor("gemma3"), build("gemma3").config
    (auto,) = load_pictures([noise(30, 50)], made, config, question="what ?").prompts
    (prompt,) = load_pictures([noise(30, 50)], made, config, question="what ?", bos=bos).prompts
    start = int(bos == "off")
    assert prompt.token_ids == auto.token_ids[start:]
    assert (prompt.visual.inputs["token_type_ids"] == auto.visual.inputs["token_type_ids"][:, start:]).all()
    assert (prompt.visual.spans.kinds == auto.visual.spans.kinds[start:]).all()


def test_samples_are_seeded_and_in_order(llava):
    pictures = [noise(9, 9, seed) for seed in range(9)]
    chosen = [p.source for p in load_pictures(pictures, *llava, n=4, seed=3).prompts]
    assert chosen == [p.source for p in load_pictures(pictures, *llava, n=4, seed=3).prompts]
    assert chosen == sorted(chosen)
    assert len(chosen) == 4


def test_models_and_processors_that_do_not_fit(llava):
    made, config = llava
    with pytest.raises(ModelError, match="reads no pictures"):
        load_pictures([noise(9, 9)], made, build("llava").config.text_config)
    wrong = build("gemma3").config
    with pytest.raises(SinklensError, match=r"does not read|image tokens"):
        load_pictures([noise(9, 9)], made, wrong)
    made.chat_template, kept = None, made.chat_template
    try:
        with pytest.raises(DataError, match="no chat template"):
            load_pictures([noise(9, 9)], made, config, chat_template=True)
    finally:
        made.chat_template = kept


def test_cell_means_are_exact_between_pixels():
    rng = np.random.default_rng(0)
    mask = rng.random((7, 5)) > 0.5
    fine = np.kron(mask, np.ones((10, 10)))
    down, across = np.array([0.3, 2.9, 7.0]), np.array([-1.0, 1.5, 3.2, 5.0])
    found = cell_means(mask, down, across)
    for row in range(2):
        for col in range(3):
            y = slice(round(10 * down[row]), round(10 * down[row + 1]))
            x = slice(max(0, round(10 * across[col])), round(10 * across[col + 1]))
            assert found[row, col] == pytest.approx(fine[y, x].mean())
    assert np.isnan(cell_means(mask, np.array([-3.0, -1.0]), np.array([0.0, 2.0]))).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 4000), (41, 40)])
def test_a_processor_that_does_not_resize_gets_no_other_size(height, width):
    """Its tower would stop at the picture, with an error that is not about the picture."""
    made, config = processor("llava"), build("llava").config
    made.image_processor.do_resize = made.image_processor.do_center_crop = False
    with pytest.raises(DataError, match="pictures of 40 x 40 pixels only") as met:
        load_pictures([noise(height, width)], made, config)
    assert f"{width} x {height}" in str(met.value)
    assert len(load_pictures([noise(40, 40)], made, config).prompts) == 1
