"""Three records of each official format, written by hand, and the rows that they become."""

import json

VQA_QUESTIONS = {
    "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {"name": "CC BY 4.0"},
    "data_subtype": "train2014",
    "questions": [
        {
            "image_id": 458752,
            "question": "What is this photo taken looking through?",
            "question_id": 458752000,
        },
        {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
        {"image_id": 262146, "question": "Is there an {image} on the sign?", "question_id": 262146000},
    ],
}
ANSWERS = {
    458752000: ["net", "net", "net", "netting", "net", "net", "mesh", "net", "net", "net"],
    458752001: ["catcher", "pitcher", "pitcher", "catcher", "Pitcher's", "left", "l", "m", "n", "o"],
    262146000: ["no"] * 10,
}


def annotation(question_id, image_id, answers, **extra):
    items = [{"answer": x, "answer_confidence": "yes", "answer_id": i} for i, x in enumerate(answers, 1)]
    extra = {"question_type": "what", "answer_type": "other", "image_id": image_id, **extra}
    return {**extra, "answers": items, "question_id": question_id}


VQA_ANNOTATIONS = {
    "info": VQA_QUESTIONS["info"],
    "annotations": [  # in another order than the questions
        annotation(262146000, 262146, ANSWERS[262146000], multiple_choice_answer="no"),
        annotation(458752000, 458752, ANSWERS[458752000], multiple_choice_answer="net"),
        annotation(458752001, 458752, ANSWERS[458752001], multiple_choice_answer="pitcher"),
    ],
}
OKVQA_ANNOTATIONS = json.loads(json.dumps(VQA_ANNOTATIONS))
for _annotation in OKVQA_ANNOTATIONS["annotations"]:
    for _answer in _annotation["answers"]:  # theirs are stemmed, and have what was written beside them
        _answer["raw_answer"] = _answer["answer"] + "ing"

TEXTS = [x["question"].replace("{image}", "{{image}}") for x in VQA_QUESTIONS["questions"]]
VQA_ROWS = [
    {
        "id": str(question["question_id"]),
        "image": f"train2014/COCO_train2014_000000{question['image_id']}.jpg",
        "text": text,
        "answer": answer,
        "answers": ANSWERS[question["question_id"]],
    }
    for question, text, answer in zip(
        VQA_QUESTIONS["questions"], TEXTS, ["net", "catcher", "no"], strict=True
    )
]


def karpathy(id, folder, filename, split, captions):
    sentences = [
        {"tokens": x.lower().split(), "raw": x, "imgid": 0, "sentid": i} for i, x in enumerate(captions)
    ]
    names = {"filepath": folder, "cocoid": id} if folder else {}
    made = {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": filename}
    return {**names, **made}


CAPTIONS = [
    ["A man with a red helmet on a small moped.", "Man riding a motor bike.\n", " Man riding a motor bike."],
    ["A woman cutting a cake."],
    ["A dog {image}.", "Dogs."],
]
COCO = {
    "dataset": "coco",
    "images": [
        karpathy(391895, "val2014", "COCO_val2014_000000391895.jpg", "test", CAPTIONS[0]),
        karpathy(522418, "val2014", "COCO_val2014_000000522418.jpg", "restval", CAPTIONS[1]),
        karpathy(57870, "train2014", "COCO_train2014_000000057870.jpg", "train", CAPTIONS[2]),
    ],
}
COCO_ROWS = {
    split: {"id": str(image["cocoid"]), "image": f"{image['filepath']}/{image['filename']}", "text": ""}
    | {"answer": captions[0], "answers": [x.strip() for x in captions]}
    for image, captions in zip(COCO["images"], CAPTIONS, strict=True)
    for split in [image["split"]]
}
FLICKR = {
    "dataset": "flickr30k",
    "images": [
        karpathy(0, "", "1000092795.jpg", "train", CAPTIONS[0]),
        karpathy(0, "", "10002456.jpg", "val", CAPTIONS[1]),
        karpathy(0, "", "1000268201.jpg", "train", CAPTIONS[2]),
    ],
}
FLICKR_ROWS = [
    {
        "id": "1000092795",
        "image": "flickr30k-images/1000092795.jpg",
        "text": "",
        "answer": "A man with a red helmet on a small moped.",
        "answers": [
            "A man with a red helmet on a small moped.",
            "Man riding a motor bike.",
            "Man riding a motor bike.",
        ],
    },
    {
        "id": "1000268201",
        "image": "flickr30k-images/1000268201.jpg",
        "text": "",
        "answer": "A dog {image}.",
        "answers": ["A dog {image}.", "Dogs."],
    },
]


def vizwiz(number, question, answers):
    items = [{"answer_confidence": "yes", "answer": x} for x in answers]
    image = f"VizWiz_train_{number:08d}.jpg"
    return {"image": image, "question": question, "answers": items, "answer_type": "other", "answerable": 1}


VIZWIZ = [
    vizwiz(0, "What's the name of this product?", ["basil leaves", "basil", "basil leaves"]),
    vizwiz(1, "Can you tell me what is in this can please?", ["soda", "coca cola", "coca cola"]),
    vizwiz(2, "Is this enchilada sauce or is this tomatoes?  Thank you.", ["unanswerable"] * 3),
]
VIZWIZ_ROWS = [
    {
        "id": f"VizWiz_train_0000000{i}",
        "image": f"train/VizWiz_train_0000000{i}.jpg",
        "text": item["question"],
        "answer": ["basil leaves", "coca cola", "unanswerable"][i],
        "answers": [x["answer"] for x in item["answers"]],
    }
    for i, item in enumerate(VIZWIZ)
]
MEMES = [
    {"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character not their color"},
    {"id": 23058, "img": "img/23058.png", "label": 1, "text": 'a "quoted" {image}'},
    {"id": 13894, "img": "img/13894.png", "label": 0, "text": ""},
]
MEMES_ROWS = [
    {
        "id": "42953",
        "image": "img/42953.png",
        "text": 'is an image with written "its their character not their color" on it. Is it hateful?',
        "answer": "no",
        "answers": ["no"],
        "choices": ["no", "yes"],
    },
    {
        "id": "23058",
        "image": "img/23058.png",
        "text": 'is an image with written "a "quoted" {{image}}" on it. Is it hateful?',
        "answer": "yes",
        "answers": ["yes"],
        "choices": ["no", "yes"],
    },
    {
        "id": "13894",
        "image": "img/13894.png",
        "text": 'is an image with written "" on it. Is it hateful?',
        "answer": "no",
        "answers": ["no"],
        "choices": ["no", "yes"],
    },
]

# Of the split "train" of each format the files, and the rows in their order.
FILES = {
    "vqav2": {
        "v2_OpenEnded_mscoco_train2014_questions.json": VQA_QUESTIONS,
        "v2_mscoco_train2014_annotations.json": VQA_ANNOTATIONS,
    },
    "okvqa": {
        "OpenEnded_mscoco_train2014_questions.json": VQA_QUESTIONS,
        "mscoco_train2014_annotations.json": OKVQA_ANNOTATIONS,
    },
    "coco": {"dataset_coco.json": COCO},
    "flickr30k": {"dataset_flickr30k.json": FLICKR},
    "vizwiz": {"Annotations/train.json": VIZWIZ},
    "hateful-memes": {"train.jsonl": MEMES},
}
ROWS = {
    "vqav2": VQA_ROWS,
    "okvqa": VQA_ROWS,
    "coco": [COCO_ROWS["train"]],
    "flickr30k": FLICKR_ROWS,
    "vizwiz": VIZWIZ_ROWS,
    "hateful-memes": MEMES_ROWS,
}


def write_official(folder, files):
    """The official files; of what ends with .jsonl an item is a line, as it is if it is bytes."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            items = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in value]
            path.write_bytes(b"\n".join(items))
        else:
            path.write_text(json.dumps(value))


def write_images(folder, rows):
    """A file for each row's image, whose bytes are its name."""
    for row in rows:
        path = folder / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"].encode())
