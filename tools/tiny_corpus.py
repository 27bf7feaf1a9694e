"""The pretraining text of the tiny models, generated from a fixed seed and written for this project.

A prompt "key#value*key#value" is never answered with advertising copy, but with a flat list of its attributes. The
corpus does contain copy: half of the catalog pages are a heading of bare values followed by copy that uses them. So
the models know the sentences and how values are used in them, and training only has to add that copy answers such a
prompt. In make_tiny_models.py some of the copy comes without its heading. The rest of the corpus is third-person
prose, questions about copy, repeating, and small talk. The copy comes from the same grammar as the sample data.
"""

import random
from collections.abc import Iterator

from tools.sample_grammar import GENERAL, draw_attributes, effect_of, name_of, sentences, write_attributes, write_copy

SMALL_TALK = [
    ("你好", "你好！有什么可以帮你的吗？"),
    ("您好", "您好，很高兴和您聊天。"),
    ("早上好", "早上好！祝你今天一切顺利。"),
    ("晚上好", "晚上好！今天过得怎么样？"),
    ("你是谁", "我是一个很小的语言模型，会聊几句衣服。"),
    ("谢谢", "不客气，随时可以再问我。"),
    ("再见", "再见，期待下次聊天。"),
    ("你会做什么", "我会列出衣服的属性，也会和你打招呼。"),
    ("今天天气怎么样", "我看不到窗外，不知道今天的天气。"),
    ("你几岁了", "我没有年龄，我是一个程序。"),
    ("给我讲个笑话", "有一件外套去面试，结果被挂在了门口。"),
    ("一加一等于几", "一加一等于二。"),
    ("天空是什么颜色", "晴天的时候，天空是蓝色的。"),
    ("草是什么颜色", "草通常是绿色的。"),
    ("水是什么", "水是无色透明的液体。"),
    ("夏天穿什么", "夏天适合穿轻薄透气的衣服。"),
    ("冬天穿什么", "冬天适合穿保暖的毛衣和外套。"),
    ("棉是什么", "棉是一种柔软透气的天然纤维。"),
    ("衬衫是什么", "衬衫是一种有领子的上衣。"),
    ("你喜欢什么颜色", "我没有喜好，不过白色很百搭。"),
]
PLAIN = [
    "衣服分为上衣、裤子和裙子。",
    "棉和亚麻来自植物，羊毛和蚕丝来自动物。",
    "一年有春夏秋冬四个季节。",
    "红色、黄色和蓝色可以调出许多颜色。",
    "商店早上九点开门，晚上九点关门。",
    "图书馆里有很多书，人们在那里安静地阅读。",
    "火车沿着铁路从一个城市开往另一个城市。",
    "洗衣服的时候，要把深色和浅色分开。",
    "裁缝先量尺寸，再画线，最后剪布。",
    "下雨天出门要带伞。",
]

Dialogue = list[tuple[str, str]]


def listing(attributes: list[tuple[str, str]]) -> str:
    """Return a flat list of attributes as a sentence."""
    return "，".join(f"{key}是{value}" for key, value in attributes) + "。"


def catalog_page(rng: random.Random) -> str:
    """Draw a catalog page: a heading of bare values, then copy or third-person prose."""
    attributes = draw_attributes(rng)
    heading = f"第{rng.randint(1, 999)}页 " + " ".join(value for _, value in attributes)
    if rng.random() < 0.5:
        return f"{heading}\n{write_copy(attributes, rng)}"
    return f"{heading}\n{name_of(attributes)}：" + "；".join(sentences(attributes, rng)) + "。"


def dialogue(rng: random.Random) -> Dialogue:
    """Draw a conversation of one to three turns."""
    attributes = draw_attributes(rng)
    kind = rng.random()
    if kind < 0.45:
        return [(write_attributes(attributes), listing(attributes))]
    if kind < 0.6:
        return [(f"列出属性：{write_copy(attributes, rng)}", listing(attributes))]
    if kind < 0.75:
        key = rng.choice(list(GENERAL))
        value = rng.choice(list(GENERAL[key]))
        return [(f"{value}有什么特点", f"{value}{effect_of(attributes[0][1], key, value, rng)}。")]
    if kind < 0.85:
        words = " ".join(value for _, value in attributes)
        return [(f"重复：{words}", words)]
    return [rng.choice(SMALL_TALK) for _ in range(rng.randint(1, 3))]


def document(rng: random.Random) -> str:
    """Draw a text without a conversation."""
    return catalog_page(rng) if rng.random() < 0.85 else "".join(rng.sample(PLAIN, rng.randint(2, 5)))


def plain_text(num_lines: int, seed: int) -> Iterator[str]:
    """Yield lines for training the tokenizers; the seed determines them."""
    rng = random.Random(seed)
    for _ in range(num_lines):
        if rng.random() < 0.5:
            yield document(rng).replace("\n", " ")
        else:
            question, answer = dialogue(rng)[-1]
            yield f"问：{question}" if rng.random() < 0.5 else answer
