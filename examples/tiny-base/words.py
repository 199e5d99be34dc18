"""The small world that the embedded base knows: word lists in English and Chinese, written for this project."""

from __future__ import annotations

NAMES_EN = [
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Nina",
    "Oscar",
    "Paul",
    "Quinn",
    "Rosa",
    "Sam",
    "Tina",
    "Uma",
    "Victor",
    "Wendy",
    "Xena",
    "Yusuf",
    "Zoe",
    "Alice",
    "Bruno",
    "Carol",
    "Dan",
    "Eva",
    "Felix",
    "Gina",
    "Hugo",
    "Ivy",
    "John",
    "Karl",
    "Lily",
    "Max",
    "Nora",
    "Otto",
    "Peter",
    "Ruth",
    "Simon",
    "Tom",
    "Vera",
    "Walter",
    "Anna",
    "Boris",
    "Cora",
    "Dora",
    "Eric",
    "Fiona",
    "George",
    "Helen",
    "Ian",
    "Julia",
    "Ken",
    "Laura",
    "Mark",
    "Nick",
    "Olga",
    "Pia",
    "Rita",
    "Steve",
]
SURNAMES_ZH = "王李张刘陈杨黄赵周吴徐孙马朱胡林郭何高罗"
GIVEN_ZH = "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超兰霞平刚桂英华玉红梅雪云海龙天文新春月星光林峰"

CITIES = (
    ("Beijing", "北京"), ("Shanghai", "上海"), ("Paris", "巴黎"), ("London", "伦敦"), ("Tokyo", "东京"),
    ("Berlin", "柏林"), ("Rome", "罗马"), ("Madrid", "马德里"), ("Cairo", "开罗"), ("Lima", "利马"),
    ("Oslo", "奥斯陆"), ("Vienna", "维也纳"), ("Delhi", "德里"), ("Seoul", "首尔"), ("Boston", "波士顿"),
    ("Dublin", "都柏林"), ("Athens", "雅典"), ("Prague", "布拉格"), ("Shenzhen", "深圳"), ("Hangzhou", "杭州"),
    ("Chengdu", "成都"), ("Nanjing", "南京"), ("Wuhan", "武汉"), ("Xiamen", "厦门"),
)  # fmt: skip

# singular, plural, Chinese, Chinese measure word
GOODS = (
    ("apple", "apples", "苹果", "个"), ("orange", "oranges", "橙子", "个"), ("pear", "pears", "梨", "个"),
    ("book", "books", "书", "本"), ("notebook", "notebooks", "笔记本", "本"), ("pen", "pens", "钢笔", "支"),
    ("pencil", "pencils", "铅笔", "支"), ("cup", "cups", "杯子", "个"), ("plate", "plates", "盘子", "个"),
    ("chair", "chairs", "椅子", "把"), ("table", "tables", "桌子", "张"), ("lamp", "lamps", "台灯", "盏"),
    ("shirt", "shirts", "衬衫", "件"), ("coat", "coats", "大衣", "件"), ("hat", "hats", "帽子", "顶"),
    ("ticket", "tickets", "车票", "张"), ("stamp", "stamps", "邮票", "张"), ("umbrella", "umbrellas", "雨伞", "把"),
    ("key", "keys", "钥匙", "把"), ("clock", "clocks", "闹钟", "个"), ("bag", "bags", "书包", "个"),
    ("knife", "knives", "小刀", "把"), ("box", "boxes", "盒子", "个"), ("towel", "towels", "毛巾", "条"),
    ("candle", "candles", "蜡烛", "支"), ("battery", "batteries", "电池", "节"), ("egg", "eggs", "鸡蛋", "个"),
    ("lemon", "lemons", "柠檬", "个"), ("cake", "cakes", "蛋糕", "块"), ("melon", "melons", "西瓜", "个"),
)  # fmt: skip

# animal, Chinese, what it eats, Chinese, where it lives, Chinese
ANIMALS = (
    ("cat", "猫", "fish", "鱼", "in the house", "家里"), ("dog", "狗", "bones", "骨头", "in the yard", "院子里"),
    ("horse", "马", "grass", "草", "on the farm", "农场里"), ("cow", "牛", "hay", "干草", "in the stable", "牛棚里"),
    ("bird", "鸟", "seeds", "种子", "in the tree", "树上"), ("fish", "鱼", "worms", "虫子", "in the lake", "湖里"),
    ("rabbit", "兔子", "carrots", "胡萝卜", "in a hole", "洞里"), ("bear", "熊", "honey", "蜂蜜", "in the forest", "森林里"),
    ("monkey", "猴子", "bananas", "香蕉", "in the jungle", "丛林里"), ("duck", "鸭子", "bread", "面包", "on the river", "河上"),
    ("mouse", "老鼠", "cheese", "奶酪", "in the wall", "墙里"), ("panda", "熊猫", "bamboo", "竹子", "in the mountains", "山里"),
)  # fmt: skip

COLORS = (
    ("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"), ("black", "黑色"), ("white", "白色"),
    ("brown", "棕色"), ("grey", "灰色"), ("pink", "粉色"), ("purple", "紫色"),
)  # fmt: skip

JOBS = (
    ("teacher", "老师"), ("doctor", "医生"), ("baker", "面包师"), ("farmer", "农民"), ("driver", "司机"),
    ("nurse", "护士"), ("painter", "画家"), ("cook", "厨师"), ("writer", "作家"), ("singer", "歌手"),
    ("pilot", "飞行员"), ("engineer", "工程师"),
)  # fmt: skip

DAYS = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"),
    ("Friday", "星期五"), ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip

WEATHER = (
    ("sunny", "晴朗"),
    ("rainy", "下雨"),
    ("windy", "刮风"),
    ("snowy", "下雪"),
    ("cloudy", "多云"),
    ("warm", "暖和"),
)

PLACES = (
    ("school", "学校"), ("market", "市场"), ("park", "公园"), ("library", "图书馆"), ("station", "车站"),
    ("hospital", "医院"), ("museum", "博物馆"), ("harbour", "港口"), ("bakery", "面包店"), ("garden", "花园"),
)  # fmt: skip

# verb phrase, past, Chinese
DEEDS = (
    ("read a letter", "读了一封信"), ("drank some tea", "喝了一点茶"), ("met an old friend", "遇见了一位老朋友"),
    ("found a coin", "捡到了一枚硬币"), ("wrote a poem", "写了一首诗"), ("took a photo", "拍了一张照片"),
    ("sang a song", "唱了一首歌"), ("bought some flowers", "买了一些花"), ("watched the rain", "看了一会儿雨"),
    ("lost an umbrella", "丢了一把雨伞"), ("helped a child", "帮助了一个孩子"), ("fed the birds", "喂了鸟"),
)  # fmt: skip

NUMBERS_EN = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
NUMBERS_ZH = [
    "零",
    "一",
    "二",
    "三",
    "四",
    "五",
    "六",
    "七",
    "八",
    "九",
    "十",
    "十一",
    "十二",
    "十三",
    "十四",
    "十五",
    "十六",
    "十七",
    "十八",
    "十九",
    "二十",
]
