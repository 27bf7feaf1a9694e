"""The grammar of the sample data: Chinese clothing attributes and the sentences that sell them.

Everything here was written for this project. An example is drawn in two steps: the attributes of a garment, then
advertising copy in which every attribute has a clause.
"""

import random

MATERIALS = {
    "棉": ["柔软亲肤", "吸汗透气"],
    "牛仔布": ["结实耐磨", "越洗越有味道"],
    "针织": ["细密柔软", "弹力十足"],
    "雪纺": ["轻盈飘逸", "凉爽不贴身"],
    "蕾丝": ["精致细腻", "隐约透出肌肤"],
    "羊毛": ["温暖厚实", "保暖又不臃肿"],
    "蚕丝": ["光泽柔和", "顺滑如水"],
    "亚麻": ["清爽透气", "带着自然的纹理"],
    "网纱": ["朦胧轻薄", "层次分明"],
    "丝绒": ["光泽迷人", "触感细腻"],
    "混纺": ["挺括有型", "不易起皱"],
    "天丝": ["垂顺清凉", "滑爽舒适"],
}
COLORS = {
    "白色": "干净明亮",
    "黑色": "沉稳显瘦",
    "红色": "热情夺目",
    "蓝色": "清爽宁静",
    "粉色": "温柔甜美",
    "灰色": "低调百搭",
    "绿色": "生机盎然",
    "黄色": "活泼亮眼",
    "紫色": "神秘优雅",
    "卡其色": "大气耐看",
    "藏青色": "端庄稳重",
    "杏色": "温暖柔和",
}
STYLES = {
    "简约": "没有多余的装饰",
    "休闲": "自在随性",
    "复古": "带着旧时光的韵味",
    "性感": "散发迷人的魅力",
    "清新": "像一阵微风",
    "文艺": "透着书卷气息",
    "通勤": "上班约会都合适",
    "街头": "个性十足",
    "甜美": "满满少女心",
    "运动": "活力满分",
    "淑女": "举止间尽是温婉",
    "民族": "充满异域风情",
    "英伦": "有着绅士般的格调",
    "青春": "朝气蓬勃",
}
PATTERNS = {
    "条纹": "拉长身形",
    "格子": "经典耐看",
    "碎花": "浪漫可爱",
    "印花": "生动醒目",
    "刺绣": "做工考究",
    "波点": "俏皮灵动",
    "纯色": "百搭不挑人",
    "字母": "时髦有趣",
    "卡通": "童趣盎然",
    "撞色": "对比鲜明",
    "蝴蝶结": "增添一抹甜意",
    "线条": "勾勒利落轮廓",
}
SHAPES = {
    "显瘦": "轻松藏起小赘肉",
    "宽松": "活动自如没有束缚",
    "修身": "贴合身体曲线",
    "直筒": "修饰腿部与腰部的线条",
    "立体剪裁": "穿起来挺括有型",
}

# Per garment: its names, and its own attributes with what each value does for the wearer.
GARMENTS = {
    "上衣": {
        "name_key": "衣样式",
        "names": ["衬衫", "外套", "卫衣", "风衣", "西装", "针织衫", "毛衣", "马甲", "开衫", "T恤", "棒球服", "打底衫"],
        "details": {
            "衣领型": {
                "翻领": "精神利落",
                "圆领": "柔和衬脸",
                "v领": "拉长颈部",
                "立领": "挺拔有气场",
                "高领": "温暖护颈",
                "方领": "露出锁骨",
            },
            "衣袖型": {
                "灯笼袖": "遮住手臂的肉肉",
                "喇叭袖": "抬手之间飘逸动人",
                "泡泡袖": "减龄又可爱",
                "落肩袖": "慵懒随意",
                "插肩袖": "舒展肩部",
                "罗纹袖口": "收紧不灌风",
            },
            "衣门襟": {
                "单排扣": "穿脱方便",
                "双排扣": "经典端正",
                "拉链": "顺滑好拉",
                "系带": "松紧可调",
                "套头": "简单省事",
            },
            "衣款式": {
                "口袋": "实用又有型",
                "连帽": "挡风又减龄",
                "拼接": "丰富了层次",
                "抽绳": "随意调节宽窄",
                "荷叶边": "灵动柔美",
                "破洞": "不羁又帅气",
            },
        },
        "match": ["搭配一条牛仔裤", "配上半身裙", "内搭一件吊带", "和阔腿裤一起穿"],
    },
    "裙": {
        "name_key": "裙长",
        "names": ["连衣裙", "半身裙", "长裙", "短裙"],
        "details": {
            "裙型": {
                "a字": "遮住胯部更显腿长",
                "百褶": "走动时裙摆翩翩",
                "鱼尾裙": "勾勒优美曲线",
                "背带裙": "俏皮减龄",
                "大裙摆": "转身便是一道风景",
                "包臀裙": "突出腰臀线条",
            },
            "裙领型": {
                "圆领": "柔和衬脸",
                "v领": "修饰脸型",
                "方领": "露出锁骨",
                "娃娃领": "乖巧可人",
                "一字领": "秀出香肩",
                "立领": "端庄优雅",
            },
            "裙下摆": {
                "荷叶边": "灵动有层次",
                "开叉": "行走间若隐若现",
                "花边": "精致甜美",
                "压褶": "立体有型",
                "垂坠": "自然流畅",
                "层叠": "蓬松梦幻",
            },
            "裙腰型": {"高腰": "提升腰线", "松紧腰": "舒适不勒", "中腰": "自然合身"},
            "裙款式": {
                "收腰": "显出纤细腰身",
                "拼接": "富有设计感",
                "口袋": "方便随手放物",
                "吊带": "清凉迷人",
                "绑带": "增添飘逸感",
                "木耳边": "细节精巧",
            },
            "裙袖型": {"泡泡袖": "宫廷感十足", "喇叭袖": "飘逸浪漫", "灯笼袖": "复古可爱", "荷叶袖": "柔美灵动"},
        },
        "match": ["搭配一双小白鞋", "配上细高跟", "外搭一件小开衫", "戴一顶草帽"],
    },
    "裤": {
        "name_key": "裤长",
        "names": ["长裤", "九分裤", "七分裤", "短裤", "五分裤", "连体裤"],
        "details": {
            "裤型": {
                "阔腿裤": "遮肉显腿直",
                "直筒裤": "不挑腿型",
                "哈伦裤": "轻松舒适",
                "铅笔裤": "紧致修身",
                "背带裤": "活泼减龄",
                "灯笼裤": "别致有趣",
            },
            "裤腰型": {"高腰": "拉长双腿比例", "松紧腰": "久坐不勒肚", "中腰": "贴合腰部"},
            "裤口": {
                "毛边": "随性不羁",
                "小脚": "利落干练",
                "微喇裤": "拉长小腿",
                "翻折": "露出纤细脚踝",
                "卷边": "俏皮随意",
                "开叉": "走路带风",
            },
            "裤款式": {
                "口袋": "方便又实用",
                "破洞": "帅气十足",
                "拉链": "时髦耐用",
                "抽绳": "可以自由调节",
                "拼接": "打破单调",
                "流苏": "走动间摇曳生姿",
            },
        },
        "match": ["搭配一件白衬衫", "上身配短款毛衣", "踩上一双运动鞋", "和宽松卫衣同穿"],
    },
}

OPENINGS = [
    "这款{name}",
    "不可错过的{name}",
    "衣橱里值得拥有的一件{name}",
    "今年很受欢迎的{name}",
    "想要穿得好看，不妨试试这款{name}",
    "精心设计的{name}",
    "让人一眼心动的{name}",
    "一件百穿不厌的{name}",
    "来自设计师的用心之作，这款{name}",
    "换季必备的{name}",
]
CLOSINGS = [
    "{match}，轻松穿出好气质。",
    "{match}，走在街上回头率很高。",
    "无论逛街还是上班，都能从容应对。",
    "每一个细节都经得起细看。",
    "{match}，舒服又好看。",
    "穿上它，整个人都精神起来。",
    "送给自己或朋友都很合适。",
    "{match}，便是一身出彩的造型。",
    "日常出行，有它就够了。",
    "让你在人群中脱颖而出。",
    "怎么穿都不会出错。",
    "{match}，简单的日子也有了仪式感。",
]
SENTENCES = {
    "材质": [
        "采用{v}面料制作，{e}",
        "选用优质的{v}，{e}",
        "{v}材质{e}，穿着非常舒适",
        "面料以{v}为主，{e}",
        "上身{e}，这正是{v}的好处",
    ],
    "颜色": [
        "{v}的色调{e}",
        "经典的{v}{e}，怎么看都不腻",
        "{v}显得{e}，很衬肤色",
        "以{v}为主色，{e}",
        "{e}的{v}格外好看",
    ],
    "风格": [
        "整体走{v}路线，{e}",
        "{v}的设计，{e}",
        "流露出{v}的气息，{e}",
        "{e}，是一派{v}的感觉",
        "喜欢{v}风的你一定会爱上它，{e}",
    ],
    "图案": ["衣身点缀{v}，{e}", "{v}元素{e}", "融入了{v}设计，{e}", "{v}的加入{e}，不再单调", "别出心裁的{v}，{e}"],
    "版型": ["{v}的版型{e}", "版型{v}，{e}", "采用{v}版型，{e}", "{v}的剪裁思路，{e}"],
}
DETAIL_SENTENCES = [
    "{v}的设计{e}",
    "{v}{e}，十分贴心",
    "搭配{v}，{e}",
    "{v}的细节处理，{e}",
    "加上{v}，{e}",
    "特别的{v}{e}",
    "{part}是{v}，{e}",
]
GENERAL = {"材质": MATERIALS, "颜色": COLORS, "风格": STYLES, "图案": PATTERNS, "版型": SHAPES}


def draw_attributes(rng: random.Random) -> list[tuple[str, str]]:
    """Draw the (key, value) pairs of a garment, its kind first, in ADGEN's order."""
    kind = rng.choice(list(GARMENTS))
    garment = GARMENTS[kind]
    general = [(key, rng.choice(list(GENERAL[key]))) for key in GENERAL if rng.random() < 0.6]
    if rng.random() < 0.2:
        general.append(("风格", rng.choice([style for style in STYLES if ("风格", style) not in general])))
    keys = rng.sample(list(garment["details"]), rng.randint(1, 3))
    details = [(key, rng.choice(list(garment["details"][key]))) for key in garment["details"] if key in keys]
    return [("类型", kind), *general, (garment["name_key"], rng.choice(garment["names"])), *details]


def effect_of(kind: str, key: str, value: str, rng: random.Random) -> str:
    """Return the text that says what an attribute value does for the wearer."""
    effects = GENERAL.get(key) or GARMENTS[kind]["details"][key]
    effect = effects[value]
    return rng.choice(effect) if isinstance(effect, list) else effect


def sentences(attributes: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """Return a clause for each attribute except the kind and the name of the garment."""
    kind = attributes[0][1]
    clauses = []
    for key, value in attributes[1:]:
        if key == GARMENTS[kind]["name_key"]:
            continue
        frame = rng.choice(SENTENCES.get(key, DETAIL_SENTENCES))
        part = key.removeprefix("衣").removeprefix("裙").removeprefix("裤")
        clauses.append(frame.format(v=value, e=effect_of(kind, key, value, rng), part=part))
    return clauses


def name_of(attributes: list[tuple[str, str]]) -> str:
    """Return the garment's name."""
    name_key = GARMENTS[attributes[0][1]]["name_key"]
    return dict(attributes)[name_key]


def write_copy(attributes: list[tuple[str, str]], rng: random.Random) -> str:
    """Write advertising copy that uses every attribute."""
    garment = GARMENTS[attributes[0][1]]
    clauses = sentences(attributes, rng)
    head = clauses[:2]
    rng.shuffle(clauses)
    text = rng.choice(OPENINGS).format(name=name_of(attributes)) + "，" + "，".join(head) + "。"
    rest = [clause for clause in clauses if clause not in head]
    while rest:
        taken, rest = rest[:2], rest[2:]
        text += "，".join(taken) + "。"
    return text + rng.choice(CLOSINGS).format(match=rng.choice(garment["match"]))


def write_attributes(attributes: list[tuple[str, str]]) -> str:
    """Write attributes in ADGEN's form: key#value joined by asterisks."""
    return "*".join(f"{key}#{value}" for key, value in attributes)
