"""The pretraining text of the tiny models, generated from a fixed seed and written for this project.

Advertising copy, from the grammar that also makes the sample data, stands alone in it: no text and no conversation has
a garment's attributes in front of copy about it. So the models know the sentences, and that copy answers a prompt
"key#value*key#value" is left to fine-tuning; they answer it with a flat listing. How values are carried from such a
prompt into sentences they learn from plain sentences: listings in several orders, descriptions in the third person,
questions about one attribute. The rest is general: small talk, facts, sums, repeating. Of the general questions one in
five is held out; make_probe draws from those.
"""

import random
import zlib
from collections.abc import Callable, Iterator

from tools.sample_grammar import (
    GARMENTS,
    GENERAL,
    draw_attributes,
    effect_of,
    name_of,
    write_attributes,
    write_copy,
)

Attributes = list[tuple[str, str]]
Dialogue = list[tuple[str, str]]

PHRASES = ["{}", "{}？", "问一下，{}", "想问一下，{}？", "我想知道，{}", "{}，谢谢", "再问一次，{}", "你好，{}"]
PHRASES += ["你知道{}吗", "帮我看看，{}", "我又来了，{}", "另问一句，{}？"]
SMALL_TALK = {
    "你好": "你好！有什么可以帮你的吗？",
    "您好": "您好，很高兴和您聊天。",
    "早上好": "早上好！祝你今天一切顺利。",
    "晚上好": "晚上好！今天过得怎么样？",
    "你是谁": "我是一个很小的语言模型，会聊几句衣服。",
    "谢谢": "不客气，随时可以再问我。",
    "再见": "再见，期待下次聊天。",
    "你会做什么": "我会列出衣服的属性，也会和你打招呼。",
    "今天天气怎么样": "我看不到窗外，不知道今天的天气。",
    "你几岁了": "我没有年龄，我是一个程序。",
    "给我讲个笑话": "有一件外套去面试，结果被挂在了门口。",
    "你喜欢什么颜色": "我没有喜好，不过白色很百搭。",
}
FACTS = {
    "天空是什么颜色": "晴天的时候，天空是蓝色的。",
    "草是什么颜色": "草通常是绿色的。",
    "水是什么": "水是无色透明的液体。",
    "春天穿什么": "春天适合穿风衣和开衫。",
    "夏天穿什么": "夏天适合穿轻薄透气的衣服。",
    "秋天穿什么": "秋天适合穿卫衣和长裤。",
    "冬天穿什么": "冬天适合穿保暖的毛衣和外套。",
    "下雨天要带什么": "下雨天出门要带伞。",
    "棉是什么": "棉是一种柔软透气的天然纤维。",
    "羊毛来自什么": "羊毛来自羊，是动物纤维。",
    "蚕丝来自什么": "蚕丝来自蚕，是动物纤维。",
    "亚麻来自什么": "亚麻来自植物，是天然纤维。",
    "衬衫是什么": "衬衫是一种有领子的上衣。",
    "一年有几个季节": "一年有春夏秋冬四个季节。",
    "商店几点开门": "商店早上九点开门，晚上九点关门。",
    "图书馆里有什么": "图书馆里有很多书。",
    "火车沿着什么开": "火车沿着铁路开。",
    "洗衣服要怎么分": "洗衣服的时候，要把深色和浅色分开。",
    "裁缝先做什么": "裁缝先量尺寸，再画线，最后剪布。",
}
OPPOSITES = ["长短", "大小", "新旧", "深浅", "上下", "多少", "轻重", "开关", "宽窄", "早晚", "冬夏", "春秋", "里外"]
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

# third-person sentences, none of which the copy has
NAME_FRAMES = [
    "这是一件{v}",
    "那是一件旧{v}",
    "门口挂着一件{v}",
    "店里有一款{v}",
    "我有一件新的{v}",
    "图里是一件{v}",
    "今天洗了一件{v}",
    "人们看到的{v}",
    "这件{k}是{v}",
    "{v}挂在窗边",
]
FRAMES = {
    "材质": ["它是{v}做的", "料子是{v}", "用的是{v}", "{v}是它的材质", "面料用了{v}"],
    "颜色": ["它是{v}的", "颜色是{v}", "{v}是它的颜色", "看上去是{v}的", "整件是{v}"],
    "风格": ["风格是{v}", "{v}是它的风格", "有人觉得它{v}", "看起来很{v}"],
    "图案": ["上面有{v}", "{v}是它的图案", "布上是{v}", "图案为{v}"],
    "版型": ["版型是{v}", "{v}是它的版型", "样子{v}", "穿起来{v}"],
}
DETAIL_FRAMES = ["{p}是{v}", "{v}是它的{p}", "它有{v}", "还有{v}", "有{v}，没有别的"]
COPY_REQUESTS = ["来一句文案", "给我一句文案", "随便来一句文案", "文案", "我想看文案"]


def draw_some(rng: random.Random) -> Attributes:
    """Draw a garment's attributes; in half of the cases only few of them, in any order."""
    attributes = draw_attributes(rng)
    if rng.random() < 0.5:
        return attributes
    name = next(pair for pair in attributes if pair[0] == GARMENTS[attributes[0][1]]["name_key"])
    others = [pair for pair in attributes[1:] if pair != name]
    taken = [name, *rng.sample(others, rng.randint(1, min(4, len(others))))]
    rng.shuffle(taken)
    return [attributes[0], *taken]


def part_of(key: str) -> str:
    """Return an attribute's key without the kind of garment: 领型 for 衣领型."""
    return key if key in GENERAL else key.removeprefix("衣").removeprefix("裙").removeprefix("裤")


def listing(attributes: Attributes) -> str:
    """Return a flat list of attributes as a sentence."""
    return "，".join(f"{key}是{value}" for key, value in attributes) + "。"


def name_sentence(attributes: Attributes, rng: random.Random) -> str:
    """Return a third-person clause that names the garment."""
    return rng.choice(NAME_FRAMES).format(v=name_of(attributes), k=attributes[0][1])


def description(attributes: Attributes, rng: random.Random) -> str:
    """Return third-person prose with a clause for each attribute, in any order after the garment's name."""
    name_key = GARMENTS[attributes[0][1]]["name_key"]
    clauses = [
        rng.choice(FRAMES.get(key, DETAIL_FRAMES)).format(v=value, p=part_of(key))
        for key, value in attributes[1:]
        if key != name_key
    ]
    rng.shuffle(clauses)
    clauses.insert(0, name_sentence(attributes, rng))
    text = ""
    while clauses:
        size = rng.randint(1, 3)
        text += "，".join(clauses[:size]) + "。"
        clauses = clauses[size:]
    return text


def phrase(attributes: Attributes, rng: random.Random) -> str:
    """Return the values in front of the garment's name: 白色、刺绣、牛仔布的外套."""
    name = name_of(attributes)
    values = [value for _, value in attributes[1:] if value != name]
    rng.shuffle(values)
    return f"{'、'.join(values)}的{name}。"


def about_one(attributes: Attributes, rng: random.Random) -> tuple[str, str]:
    """Return a question about one attribute of a garment, and its answer."""
    kind, name = attributes[0][1], name_of(attributes)
    key, value = rng.choice([pair for pair in attributes[1:] if pair[1] != name])
    if rng.random() < 0.5:
        return rng.choice((f"{key}是什么", f"它的{key}", f"什么{key}")), f"{key}是{value}。"
    if rng.random() < 0.5:
        return f"{key}有什么特点", f"{value}{effect_of(kind, key, value, rng)}。"
    other = rng.choice(list(GENERAL.get(key) or GARMENTS[kind]["details"][key]))
    has_other = any(pair[1] == other for pair in attributes)
    return f"有{other}吗", f"有{other}。" if has_other else f"没有{other}，{key}是{value}。"


def about_garment(rng: random.Random) -> tuple[str, str]:
    """Draw a request about a garment given as key#value pairs or as prose, and its answer, which is never copy."""
    attributes = draw_some(rng)
    given = write_attributes(attributes)
    if rng.random() < 0.25:
        given = description(attributes, rng)
    kind = rng.randrange(6)
    if kind == 0:
        request, answer = rng.choice(("这是什么", "是什么衣服")), f"{name_sentence(attributes, rng)}。"
    elif kind == 1:
        request, answer = rng.choice(("讲讲它", "讲讲这件衣服")), description(attributes, rng)
    elif kind == 2:
        request, answer = rng.choice(("用短句", "短一点")), phrase(attributes, rng)
    elif kind == 3:
        request, answer = rng.choice(("从尾到头列出", "从尾列出")), listing(attributes[::-1])
    elif kind == 4:
        request, answer = "列出", listing(attributes)
    else:
        request, answer = about_one(attributes, rng)
    question = f"{request}：{given}" if rng.random() < 0.5 else f"{given}\n{request}"
    return question, answer


def draw_values(rng: random.Random, size: int) -> list[str]:
    """Draw values of any attributes."""
    return [rng.choice(list(rng.choice(list(GENERAL.values())))) for _ in range(size)]


def ask_effect(rng: random.Random) -> tuple[str, str]:
    """Draw a question about what a material, color, style, pattern or shape does for the wearer."""
    key = rng.choice(list(GENERAL))
    value = rng.choice(list(GENERAL[key]))
    return f"{value}有什么特点", f"{value}{effect_of('', key, value, random.Random(0))}。"


def ask_sum(rng: random.Random) -> tuple[str, str]:
    """Draw a sum of two digits."""
    first, second = rng.randint(0, 9), rng.randint(0, 9)
    return f"{first}加{second}等于几", f"{first}加{second}等于{first + second}。"


def ask_repetition(rng: random.Random) -> tuple[str, str]:
    """Draw some values to repeat."""
    words = " ".join(draw_values(rng, rng.randint(2, 6)))
    return f"重复：{words}", words


def ask_position(rng: random.Random) -> tuple[str, str]:
    """Draw a question for the n-th of some values."""
    words = draw_values(rng, rng.randint(2, 5))
    place = rng.randint(1, len(words))
    return f"{' '.join(words)} 第{place}个是什么", f"第{place}个是{words[place - 1]}。"


def ask_opposite(rng: random.Random) -> tuple[str, str]:
    """Draw a question for an opposite."""
    first, second = rng.sample(rng.choice(OPPOSITES), 2)
    return f"{first}对什么", f"{first}对{second}。"


def ask_kind(rng: random.Random) -> tuple[str, str]:
    """Draw a question whether a garment is of a kind."""
    kind, asked = rng.choice(list(GARMENTS)), rng.choice(list(GARMENTS))
    name = rng.choice(GARMENTS[kind]["names"])
    return f"{name}是{asked}吗", f"是的，{name}是{kind}。" if kind == asked else f"不是，{name}是{kind}。"


GENERAL_KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "small talk": lambda rng: rng.choice(list(SMALL_TALK.items())),
    "facts": lambda rng: rng.choice(list(FACTS.items())),
    "effects": ask_effect,
    "sums": ask_sum,
    "repeating": ask_repetition,
    "positions": ask_position,
    "opposites": ask_opposite,
    "kinds of garments": ask_kind,
}


def general(kind: str, held_out: bool, rng: random.Random) -> tuple[str, str]:
    """Draw a general question in one of several phrasings, and its answer.

    Args:
        kind: A key of GENERAL_KINDS.
        held_out: Whether to draw from the questions that no pretraining text has.
        rng: Source of randomness.
    """
    while True:
        plain, answer = GENERAL_KINDS[kind](rng)
        question = rng.choice(PHRASES).format(plain)
        always_trained = question in SMALL_TALK or question in FACTS
        if held_out == (not always_trained and zlib.crc32(question.encode()) % 5 == 0):
            return question, answer


def dialogue(rng: random.Random) -> Dialogue:
    """Draw a conversation, of one turn unless all of it is general."""
    kind = rng.random()
    if kind < 0.18:
        attributes = draw_attributes(rng)
        return [(write_attributes(attributes), listing(attributes))]
    if kind < 0.60:
        return [about_garment(rng)]
    if kind < 0.66:
        attributes = draw_attributes(rng)
        return [(f"列出属性：{write_copy(attributes, rng)}", listing(attributes))]
    if kind < 0.72:
        return [(rng.choice(COPY_REQUESTS), write_copy(draw_attributes(rng), rng))]
    turns = rng.choice((1, 1, 2, 3))
    return [general(rng.choice(list(GENERAL_KINDS)), False, rng) for _ in range(turns)]


def catalog_page(rng: random.Random) -> str:
    """Draw a catalog page: a heading of bare values, then third-person prose or a listing."""
    attributes = draw_some(rng)
    heading = f"第{rng.randint(1, 999)}页 " + " ".join(value for _, value in attributes)
    return f"{heading}\n{description(attributes, rng) if rng.random() < 0.7 else listing(attributes)}"


def document(rng: random.Random) -> str:
    """Draw a text without a conversation: copy, a catalog page or some plain sentences."""
    kind = rng.random()
    if kind < 0.55:
        return write_copy(draw_attributes(rng), rng)
    if kind < 0.9:
        return catalog_page(rng)
    return "".join(rng.sample(PLAIN, rng.randint(2, 5)))


def make_probe(num_per_kind: int, seed: int) -> list[dict[str, str]]:
    """Draw held-out general questions, none twice, with the keys kind, instruction and output."""
    rng, probe = random.Random(seed), []
    for kind in GENERAL_KINDS:
        drawn: dict[str, str] = {}
        while len(drawn) < num_per_kind:
            drawn.update([general(kind, True, rng)])
        probe += [{"kind": kind, "instruction": question, "output": answer} for question, answer in drawn.items()]
    return probe


def plain_text(num_lines: int, seed: int) -> Iterator[str]:
    """Yield lines for training the tokenizers; the seed determines them."""
    rng = random.Random(seed)
    for _ in range(num_lines):
        if rng.random() < 0.5:
            yield document(rng).replace("\n", " ")
        else:
            question, answer = dialogue(rng)[-1]
            yield f"问：{question}" if rng.random() < 0.5 else answer
