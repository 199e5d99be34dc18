"""Write the demo's dataset: an order in free English or Chinese becomes one line of JSON.

    python examples/tiny-base/demo_data.py OUT_FOLDER

    {"name":"Anna Keller","item":"green tea","count":3,"city":"Oslo","time":"14:30"}

Always these five keys in this order, no spaces. `name`, `item` and `city` are words of the message, the item in
the singular; `count` and `time` are normalised ("half a dozen", 两打, "half past six in the evening",
下午三点半). A second person, number or city in the message is there to mislead. `train.jsonl` and `heldout.jsonl`
share no message, no answer, and no customer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from numerals import (
    TIMES,
    chinese_time,
    clock,
    counting_word,
    english_number,
    english_time,
    several_chinese,
    several_english,
)  # fmt: skip
from words import CITIES, FIRST_NAMES, GIVEN, LAST_NAMES, SURNAMES

NUM_TRAIN, NUM_HELD_OUT = 2400, 200


@dataclass(frozen=True)
class Order:
    """The answer; its fields in this order are the keys of the JSON."""

    name: str
    item: str
    count: int
    city: str
    time: str


# English item, what it is counted in (empty: itself), Chinese item, measure word
ITEMS = (
    ("green tea", "box", "绿茶", "盒"), ("black coffee", "bag", "黑咖啡", "袋"),
    ("orange juice", "bottle", "橙汁", "瓶"),
    ("olive oil", "bottle", "橄榄油", "瓶"), ("honey", "jar", "蜂蜜", "罐"), ("milk", "carton", "牛奶", "盒"),
    ("rice", "bag", "大米", "袋"), ("white paper", "pack", "白纸", "包"), ("chocolate", "box", "巧克力", "盒"),
    ("red wine", "bottle", "红酒", "瓶"), ("soap", "bar", "香皂", "块"), ("sugar", "bag", "白糖", "袋"),
    ("noodles", "pack", "面条", "包"), ("water", "bottle", "矿泉水", "瓶"), ("apple", "", "苹果", "个"),
    ("lemon", "", "柠檬", "个"), ("melon", "", "西瓜", "个"), ("birthday cake", "", "生日蛋糕", "个"),
    ("notebook", "", "笔记本", "本"), ("dictionary", "", "词典", "本"), ("blue pen", "", "蓝色钢笔", "支"),
    ("pencil", "", "铅笔", "支"), ("desk lamp", "", "台灯", "盏"), ("wooden chair", "", "木椅子", "把"),
    ("round table", "", "圆桌", "张"), ("umbrella", "", "雨伞", "把"), ("towel", "", "毛巾", "条"),
    ("blanket", "", "毯子", "条"), ("pillow", "", "枕头", "个"), ("mirror", "", "镜子", "面"),
    ("candle", "", "蜡烛", "支"), ("coffee cup", "", "咖啡杯", "个"), ("tea pot", "", "茶壶", "把"),
    ("wool hat", "", "毛线帽", "顶"), ("leather bag", "", "皮包", "个"), ("white shirt", "", "白衬衫", "件"),
    ("raincoat", "", "雨衣", "件"), ("camera", "", "相机", "台"), ("keyboard", "", "键盘", "个"),
    ("phone case", "", "手机壳", "个"), ("guitar", "", "吉他", "把"), ("football", "", "足球", "个"),
    ("kite", "", "风筝", "只"), ("city map", "", "城市地图", "张"), ("flower pot", "", "花盆", "个"),
    ("mug", "", "马克杯", "个"),
)  # fmt: skip
ENGLISH, CHINESE = 0, 2
"""Where the item's names stand in an entry of ITEMS."""

# {other} is a person who is not the customer, {not_city} a city that is not the destination, {not_count} not the count
ENGLISH_MESSAGES = (
    "Hi, this is {name}. Please send {order} to {city} at {time}.",
    "{name} here. I need {order} in {city} by {time}, please.",
    "Could you deliver {order} to {city}? I am free at {time}. Thanks, {name}",
    "Please bring {order} to our office in {city} at {time}. My name is {name}.",
    "I would like to order {order}. The name is {name}, the city is {city}, and {time} suits me.",
    "Order for {name}: {order}, to {city}, at {time}.",
    "Good morning, {name} speaking. We are out of stock in {city}, so please send {order} before {time}.",
    "At {time} I will be in {city}. Please have {order} ready for {name}.",
    "My name is {name} and I want {order}. Deliver to {city} around {time}.",
    "{name} from {city} asks for {order}, delivery at {time}.",
    "It's {name}. Can I get {order} at {time}? I live in {city}.",
    "Dear shop, {order} for {city}, please. Come at {time}. Best wishes, {name}",
    "{other} told me about your shop. I am {name}, and I want {order} in {city} at {time}.",
    "Please send {order} to {city}, not to {not_city}, at {time}. Regards, {name}",
    "Not {not_count}, but {order} this time, please. {name}, {city}, {time}.",
    "Send {order} to {city} at {time} and say hello to {other}. {name}",
    "We moved from {not_city} to {city}. Please deliver {order} here at {time}. {name}",
    "{name} is waiting in {city} for {order} and hopes to get it at {time}.",
)  # fmt: skip
CHINESE_MESSAGES = (
    "你好，我是{name}，请在{time}送{order}到{city}。",
    "我叫{name}，想订{order}，{time}送到{city}。",
    "{name}要{order}，地址在{city}，{time}送。",
    "请给{city}的{name}送{order}，{time}到就行。",
    "麻烦{time}把{order}送到{city}，收货人{name}。",
    "您好，{city}这边需要{order}，{time}之前送到，联系人是{name}。",
    "订单：{order}，{city}，{time}，{name}。",
    "我在{city}，想买{order}，{time}有空收货。谢谢！{name}",
    "{time}我会在{city}，请准备好{order}。我是{name}。",
    "店家你好，来{order}，送{city}，时间{time}，我姓名{name}。",
    "能不能{time}送{order}？我住{city}，叫{name}。",
    "{name}想在{time}收到{order}，城市是{city}。",
    "{other}推荐我来的。我是{name}，要{order}，{time}送到{city}。",
    "请把{order}送到{city}，不是{not_city}，{time}送，{name}收。",
    "这次不要{not_count}，要{order}，{time}送{city}。{name}",
    "{time}送{order}到{city}，顺便问候{other}。{name}",
    "我从{not_city}搬到{city}了，{order}请{time}送来。{name}",
    "{city}的客户{name}在等{order}，希望{time}收到。",
)  # fmt: skip


def quantity(count: int, entry: tuple[str, ...], chinese: bool, rng: Random) -> str:
    """What is ordered, and how many of it."""
    item, unit, item_zh, measure = entry
    if chinese:
        return several_chinese(count, item_zh, measure, rng, by_dozen=not unit)
    return several_english(count, item, unit, rng)


def customer(rng: Random, chinese: bool) -> str:
    """A full name."""
    if chinese:
        return rng.choice(SURNAMES) + "".join(rng.choice(GIVEN) for _ in range(rng.choice((1, 2, 2))))
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def draw(rng: Random, chinese: bool) -> tuple[str, Order]:
    """One message and its answer."""
    entry, count, (hour, minute) = (
        rng.choice(ITEMS),
        rng.choice((*range(1, 13), *range(1, 13), 15, 20, 24)),
        rng.choice(TIMES),
    )
    city, not_city = (place[chinese] for place in rng.sample(CITIES, 2))
    name, other = customer(rng, chinese), customer(rng, chinese)
    not_count = rng.choice([number for number in range(2, 13) if number != count])
    template = rng.choice(CHINESE_MESSAGES if chinese else ENGLISH_MESSAGES)
    message = template.format(
        name=name,
        order=quantity(count, entry, chinese, rng),
        city=city,
        time=(chinese_time if chinese else english_time)(hour, minute, rng),
        other=other,
        not_city=not_city,
        not_count=counting_word(not_count) + entry[3] if chinese else english_number(not_count),
    )
    return message, Order(name, entry[CHINESE if chinese else ENGLISH], count, city, clock(hour, minute))


def row(message: str, order: Order) -> str:
    """One line of the file, OpenAI's messages."""
    answer = json.dumps(asdict(order), ensure_ascii=False, separators=(",", ":"))
    messages = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def rows(count: int, rng: Random, names_taken: set[str]) -> tuple[list[str], set[str]]:
    """`count` rows, alternately English and Chinese, none of a name in `names_taken`; and the names they have."""
    made: dict[str, str] = {}
    names: set[str] = set()
    while len(made) < count:
        message, order = draw(rng, chinese=len(made) % 2 == 1)
        if order.name not in names_taken and message not in made:
            made[message] = row(message, order)
            names.add(order.name)
    return list(made.values()), names


def write(folder: Path, seed: int = 7) -> None:
    """`train.jsonl` and `heldout.jsonl`, the same for the same seed."""
    rng = Random(seed)
    held_out, names = rows(NUM_HELD_OUT, rng, set())
    train, _ = rows(NUM_TRAIN, rng, names)
    for file_name, lines in (("train.jsonl", train), ("heldout.jsonl", held_out)):
        (folder / file_name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
