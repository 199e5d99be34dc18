"""Word lists in English and Chinese, written for this project. Pairs are (English, Chinese)."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Adam Alice Amir Amy Ana Anna Anton Arthur Ben Bella Carl Carla Chen Clara Daniel David Diana Dora Edith Elena "
    "Eli Ella Emma Eric Eva Felix Fiona Frank Gina Grace Greta Hana Hanna Harry Hugo Ian Ida Igor Iris Ivan Jack "
    "Jana Jane Jim Joan John Jonas Judith Julia Karl Kate Kim Lara Laura Lea Leo Li Lily Linda Lisa Louis Lucas "
    "Lucy Maria Mark Martin Mary Max Maya Mei Mia Mina Mona Nadia Nils Nina Noah Nora Olga Oliver Omar Oscar Otto "
    "Paula Paul Peter Petra Philip Rita Robert Rosa Ruth Sam Sara Simon Sofia Stella Tara Thomas Tim Tom Vera "
    "Victor Wei Yuki Zoe"
)

LAST_NAMES = _words(
    "Adler Andrews Baker Barnes Becker Bell Berg Bishop Blake Brown Burton Carter Chan Clark Cole Cook Cooper Costa "
    "Cruz Dale Dean Diaz Duran Ellis Evans Farmer Fischer Fisher Ford Foster Fox Garcia Gray Green Hall Harris Hill "
    "Holm Hunt Ito Jensen Jones Keller King Klein Kumar Lane Lang Larsen Lee Lewis Lopez Marsh Mason Meyer Miller "
    "Moore Morris Muller Nash Neal Nolan Novak Olsen Owen Park Parker Patel Perez Price Quinn Reed Rice Rivera "
    "Roberts Rossi Santos Sato Schmidt Shaw Silva Smith Stone Tanaka Taylor Turner Wagner Walker Wang Ward Watson "
    "Weber West White Wilson Wolf Wood Wright Young Zhang Zimmer"
)

SURNAMES = (
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林高罗郑梁谢宋唐许韩冯邓曹彭曾肖田董潘袁蔡蒋余于杜叶程魏苏吕丁任卢姚沈钟姜崔"
    "谭陆范汪廖石金韦贾夏付方白邹孟熊秦邱江尹薛段侯龙史陶黎贺顾毛郝龚邵万钱严武戴莫孔向汤"
)
GIVEN = (
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华玉兰红梅建文斌宇浩然子轩雨欣怡佳慧嘉琪梦洁雪琳晨阳思远志鹏飞俊"
    "峰晓东海波新春国安家乐小天一诺若溪可心月星云帆清书言青山冰竹松柏樱莉萍凤珍瑞宁康成立永元生光辉亮凯博泽睿翔宏彬"
    "健诚信义礼智"
)

CITIES = (
    ("Oslo", "奥斯陆"), ("Paris", "巴黎"), ("Berlin", "柏林"), ("Rome", "罗马"), ("Madrid", "马德里"),
    ("London", "伦敦"), ("Vienna", "维也纳"), ("Prague", "布拉格"), ("Lisbon", "里斯本"), ("Athens", "雅典"),
    ("Dublin", "都柏林"), ("Warsaw", "华沙"), ("Cairo", "开罗"), ("Nairobi", "内罗毕"), ("Delhi", "德里"),
    ("Tokyo", "东京"), ("Osaka", "大阪"), ("Seoul", "首尔"), ("Beijing", "北京"), ("Shanghai", "上海"),
    ("Nanjing", "南京"), ("Hangzhou", "杭州"), ("Chengdu", "成都"), ("Wuhan", "武汉"), ("Xian", "西安"),
    ("Suzhou", "苏州"), ("Qingdao", "青岛"), ("Dalian", "大连"), ("Kunming", "昆明"), ("Harbin", "哈尔滨"),
    ("Guangzhou", "广州"), ("Shenzhen", "深圳"), ("Xiamen", "厦门"), ("Tianjin", "天津"), ("Chongqing", "重庆"),
    ("Hanoi", "河内"), ("Bangkok", "曼谷"), ("Sydney", "悉尼"), ("Boston", "波士顿"), ("Chicago", "芝加哥"),
    ("Denver", "丹佛"), ("Toronto", "多伦多"), ("Lima", "利马"), ("Geneva", "日内瓦"), ("Munich", "慕尼黑"),
    ("Venice", "威尼斯"), ("Porto", "波尔图"), ("Zurich", "苏黎世"), ("Helsinki", "赫尔辛基"), ("Milan", "米兰"),
)  # fmt: skip

COLOURS = (
    ("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"), ("white", "白色"), ("black", "黑色"),
    ("grey", "灰色"), ("brown", "棕色"), ("purple", "紫色"), ("orange", "橙色"), ("pink", "粉色"), ("golden", "金色"),
)  # fmt: skip

# animal, what it eats, where it lives: facts of the small world
ANIMALS = (
    ("cat", "猫", "fish", "鱼", "house", "房子"), ("dog", "狗", "meat", "肉", "house", "房子"),
    ("horse", "马", "grass", "草", "stable", "马棚"), ("cow", "牛", "grass", "草", "meadow", "草地"),
    ("sheep", "羊", "grass", "草", "meadow", "草地"), ("pig", "猪", "potatoes", "土豆", "sty", "猪圈"),
    ("duck", "鸭子", "snails", "蜗牛", "pond", "池塘"), ("hen", "母鸡", "corn", "玉米", "yard", "院子"),
    ("goose", "鹅", "grass", "草", "pond", "池塘"), ("rabbit", "兔子", "carrots", "胡萝卜", "burrow", "地洞"),
    ("mouse", "老鼠", "cheese", "奶酪", "hole", "洞"), ("fox", "狐狸", "mice", "老鼠", "forest", "森林"),
    ("wolf", "狼", "sheep", "羊", "forest", "森林"), ("bear", "熊", "honey", "蜂蜜", "cave", "山洞"),
    ("lion", "狮子", "zebras", "斑马", "savanna", "草原"), ("tiger", "老虎", "deer", "鹿", "jungle", "丛林"),
    ("elephant", "大象", "leaves", "树叶", "savanna", "草原"), ("monkey", "猴子", "bananas", "香蕉", "jungle", "丛林"),
    ("panda", "熊猫", "bamboo", "竹子", "mountains", "山里"), ("owl", "猫头鹰", "mice", "老鼠", "tree", "树上"),
    ("eagle", "鹰", "snakes", "蛇", "mountains", "山里"), ("parrot", "鹦鹉", "seeds", "种子", "jungle", "丛林"),
    ("turtle", "乌龟", "plants", "植物", "pond", "池塘"), ("frog", "青蛙", "flies", "苍蝇", "pond", "池塘"),
    ("snake", "蛇", "frogs", "青蛙", "desert", "沙漠"), ("whale", "鲸鱼", "shrimps", "虾", "sea", "大海"),
    ("shark", "鲨鱼", "fish", "鱼", "sea", "大海"), ("bee", "蜜蜂", "nectar", "花蜜", "hive", "蜂巢"),
    ("spider", "蜘蛛", "flies", "苍蝇", "web", "网上"), ("camel", "骆驼", "thorns", "荆棘", "desert", "沙漠"),
)  # fmt: skip

JOBS = (
    ("teacher", "老师"), ("doctor", "医生"), ("nurse", "护士"), ("farmer", "农民"), ("baker", "面包师"),
    ("cook", "厨师"), ("driver", "司机"), ("pilot", "飞行员"), ("painter", "画家"), ("writer", "作家"),
    ("singer", "歌手"), ("actor", "演员"), ("engineer", "工程师"), ("lawyer", "律师"), ("judge", "法官"),
    ("gardener", "园丁"), ("tailor", "裁缝"), ("sailor", "水手"), ("soldier", "士兵"), ("student", "学生"),
    ("carpenter", "木匠"), ("fisherman", "渔夫"), ("musician", "音乐家"), ("dentist", "牙医"),
)  # fmt: skip

FOODS = (
    ("apple", "苹果"), ("pear", "梨"), ("peach", "桃子"), ("banana", "香蕉"), ("lemon", "柠檬"), ("grape", "葡萄"),
    ("cherry", "樱桃"), ("melon", "西瓜"), ("tomato", "西红柿"), ("potato", "土豆"), ("carrot", "胡萝卜"),
    ("onion", "洋葱"), ("bread", "面包"), ("rice", "米饭"), ("soup", "汤"), ("noodles", "面条"), ("dumplings", "饺子"),
    ("cheese", "奶酪"), ("egg", "鸡蛋"), ("cake", "蛋糕"), ("salad", "沙拉"), ("pizza", "披萨"),
    ("chocolate", "巧克力"),
    ("porridge", "粥"), ("pie", "馅饼"), ("bean", "豆子"),
)  # fmt: skip

# English singular and plural, Chinese, its measure word
THINGS = (
    ("book", "books", "书", "本"), ("lamp", "lamps", "台灯", "盏"), ("table", "tables", "桌子", "张"),
    ("chair", "chairs", "椅子", "把"), ("key", "keys", "钥匙", "把"), ("box", "boxes", "盒子", "个"),
    ("bag", "bags", "书包", "个"), ("cup", "cups", "杯子", "个"), ("clock", "clocks", "闹钟", "个"),
    ("hat", "hats", "帽子", "顶"), ("coat", "coats", "大衣", "件"), ("pen", "pens", "钢笔", "支"),
    ("letter", "letters", "信", "封"), ("map", "maps", "地图", "张"), ("bicycle", "bicycles", "自行车", "辆"),
    ("boat", "boats", "船", "条"), ("camera", "cameras", "相机", "台"), ("phone", "phones", "手机", "部"),
    ("piano", "pianos", "钢琴", "架"), ("guitar", "guitars", "吉他", "把"), ("drum", "drums", "鼓", "面"),
    ("ball", "balls", "球", "个"), ("kite", "kites", "风筝", "只"), ("mirror", "mirrors", "镜子", "面"),
    ("candle", "candles", "蜡烛", "支"), ("spoon", "spoons", "勺子", "把"), ("knife", "knives", "刀", "把"),
    ("bottle", "bottles", "瓶子", "个"), ("basket", "baskets", "篮子", "个"), ("pillow", "pillows", "枕头", "个"),
    ("umbrella", "umbrellas", "雨伞", "把"), ("shirt", "shirts", "衬衫", "件"), ("brush", "brushes", "刷子", "把"),
    ("towel", "towels", "毛巾", "条"), ("notebook", "notebooks", "笔记本", "本"), ("ticket", "tickets", "车票", "张"),
)  # fmt: skip

# in English, what it comes in, in Chinese, its measure word
GOODS = (
    ("flour", "bag", "面粉", "袋"), ("salt", "bag", "食盐", "袋"), ("vinegar", "bottle", "白醋", "瓶"),
    ("beer", "bottle", "啤酒", "瓶"), ("candy", "bag", "糖果", "袋"), ("jam", "jar", "果酱", "罐"),
    ("ink", "bottle", "墨水", "瓶"), ("glue", "bottle", "胶水", "瓶"), ("cotton", "pack", "棉花", "包"),
    ("butter", "pack", "黄油", "包"), ("black tea", "box", "红茶", "盒"), ("white chalk", "box", "白粉笔", "盒"),
    ("cream", "carton", "奶油", "盒"), ("toffee", "bar", "太妃糖", "块"), ("yellow paint", "jar", "黄油漆", "罐"),
    ("big stone", "", "大石头", "块"), ("garden chair", "", "花园椅子", "把"), ("story book", "", "故事书", "本"),
    ("school bag", "", "书包", "个"), ("paper kite", "", "纸风筝", "只"), ("silver spoon", "", "银勺子", "把"),
    ("rain hat", "", "雨帽", "顶"), ("wall clock", "", "挂钟", "个"), ("red brush", "", "红刷子", "把"),
    ("small bell", "", "小铃铛", "个"), ("glass ball", "", "玻璃球", "个"), ("old coin", "", "旧硬币", "枚"),
)  # fmt: skip

PLACES = (
    ("garden", "花园"), ("market", "市场"), ("school", "学校"), ("river", "河边"), ("forest", "森林"),
    ("beach", "海滩"),
    ("station", "车站"), ("library", "图书馆"), ("kitchen", "厨房"), ("hospital", "医院"), ("park", "公园"),
    ("museum", "博物馆"), ("farm", "农场"), ("harbour", "港口"), ("bakery", "面包店"), ("office", "办公室"),
    ("village", "村子"), ("bridge", "桥上"), ("theatre", "剧院"), ("hotel", "酒店"),
)  # fmt: skip

WEATHER = (
    ("sunny", "晴朗"), ("rainy", "多雨"), ("windy", "多风"), ("cloudy", "多云"), ("foggy", "有雾"), ("hot", "炎热"),
    ("cold", "寒冷"), ("warm", "温暖"), ("cool", "凉爽"), ("dry", "干燥"),
)  # fmt: skip

FEELINGS = (
    ("happy", "高兴"), ("sad", "难过"), ("tired", "疲倦"), ("hungry", "饥饿"), ("proud", "自豪"), ("angry", "生气"),
    ("calm", "平静"), ("curious", "好奇"), ("afraid", "害怕"), ("surprised", "惊讶"),
)  # fmt: skip

DEEDS = (
    ("read a letter", "读了一封信"), ("drank some tea", "喝了一点茶"), ("found a coin", "捡到一枚硬币"),
    ("wrote a poem", "写了一首诗"), ("sang a song", "唱了一首歌"), ("bought some flowers", "买了一些花"),
    ("lost an umbrella", "丢了一把雨伞"), ("helped a child", "帮助了一个孩子"), ("met an old friend", "遇到一位老朋友"),
    ("drew a picture", "画了一幅画"), ("baked a cake", "烤了一个蛋糕"), ("fixed a clock", "修好了一个钟"),
    ("opened a window", "打开了一扇窗"), ("told a story", "讲了一个故事"), ("planted a tree", "种了一棵树"),
    ("waited for the train", "等了一会儿火车"), ("fed the birds", "喂了小鸟"), ("cleaned the table", "擦了桌子"),
)  # fmt: skip

OPPOSITES = (
    (("big", "大"), ("small", "小")), (("hot", "热"), ("cold", "冷")), (("long", "长"), ("short", "短")),
    (("old", "旧"), ("new", "新")), (("fast", "快"), ("slow", "慢")), (("heavy", "重"), ("light", "轻")),
    (("high", "高"), ("low", "低")), (("day", "白天"), ("night", "黑夜")), (("left", "左"), ("right", "右")),
    (("early", "早"), ("late", "晚")), (("happy", "高兴"), ("sad", "难过")), (("soft", "软"), ("hard", "硬")),
)  # fmt: skip

WEEKDAYS = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"), ("Friday", "星期五"),
    ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

# Frequent characters; copying drills draw from them, so that names never seen can be copied.
COMMON = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多"
    "定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因"
    "由其些然前外天政四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解"
    "问意建月公无系军很情者最立代想已通并提直题党程展五果料象员革位入常文总次品式活设及管特件长求老头基资边流路级少"
    "图山统接知较将组见计别她手角期根论运农指几九区强放决西被干做必战先回则任取据处队南给色光门即保治北造百规热领七"
    "海口东导器压志世金增争济阶油思术极交受联什认六共权收证改清己美再采转更单风切打白教速花带安场身车例真务具万每目"
    "至达走积示议声报斗完类八离华名确才科张信马节话米整空元况今集温传土许步群广石记需段研界拉林律叫且究观越织装影算"
    "低持音众书布复容儿须际商非验连断深难近矿千周委素技备半办青省列习响约支般史感劳便团往酸历市克何除消构府称太准精"
    "值号率族维划选标写存候毛亲快效斯院查江型眼王按格养易置派层片始却专状育厂京识适属圆包火住调满县局照参红细引听该"
    "铁价严首底液官德随病苏失尔死讲配女黄推显谈罪神艺呢席含企望密批营项防举球英氧势告李台落木帮轮破亚师围注远字材排"
    "供河态封另施减树溶怎止案言士均武固叶鱼波视仅费紧爱左章早朝害续轻服试食充兵源判护司足某练差致板田降黑杯盒袋瓶椅"
    "帽裙裤鞋袜伞笛琴笼饼糕汤粥梨桃橙柠檬葡萄芒蕉莓椰奶咖啡蜂蜜茶巾毯枕刷皂烛珠链环镜梳箱您吗吧请谢送订晚午刻吃喝玩"
    "买卖借络址货顺迎客户希城荐搬顾店姓姐妹弟哥爸妈爷朋友昨末假春夏秋冬雨雪云阳草鸟虫猪狗猫饭菜肉蛋盐糖酒校室考课桌"
    "脑网游戏乐歌舞画屏幕键盘钱块贵宜折扣退换坏修忙慢冷胖瘦丑旧右喂嗯哦啊嘛挺懒笨聪睡醒梦哭笑喊跑跳坐站躺洗擦扫拿抱"
    "扔挂穿戴脱剪煮炒烤煎蒸尝闻摸碰疼药医检楼房租钥匙灯窗墙床柜沙厨厕浴壶罐顶架辆艘匹串堆双副套盆棵朵滴颗枚泉皮壳香"
    "橄榄词典铅够谁哪虽丁丹丽亮付伟伦余佛佳侯俊健兰冯冰凤凯刘刚勇博卢厦吕吴哈唐嘉圳奥姚姜威娜娟孔孙孟宁宇宋宏尹尼岛"
    "峰崔州巴帆庆康廖彬彭徐怡悉慕慧敏敦斌昆星晓晨智曹曼曾朱杜杨杭杰松柏桂梁梅樱欣毕永汉汪沈泽洁洋津浩涛溪滨潘熊玉珍"
    "琪琳瑞瓦睿磊礼秀秦竹纳罗翔肖胡艳芝芳若范莉莫萍董蒋蔡薛袁诚诺谭谷贺贾赫赵超轩辉辛邓邱邵邹郑郝郭钟阪陆陈陶雅霞静"
    "韦韩顿飞魏鹏黎龙龚丛丢乌倦兔兴凉刀剧助勺匠卜吉唱园圈塘夜夫奇孩寒巢巧币幅怕惊扇披捡故斑晴暖朗村柿桥棕棘棚森植母"
    "池洞渔港滩演漠灰炎燥爽牙牛狐狮狸狼猴瓜疲盏短硬票笔筝篮粉紫绿缝羊船苍苹荆萝萨葱蓝虎虾蛇蛙蛛蜗蜘蜡蝇衣衫衬裁讶诗"
    "读豆豪软遇酪钢闹雾饥饺饿馅馆驼骆鲨鲸鸡鸭鹅鹉鹦鹰鹿鼓鼠龟纸烦麻汁"
)

SYLLABLES = _words(
    "ba be bi bo da de di do fa fe fi ga go ha he hi ka ke ki ko la le li lo lu ma me mi mo mu na ne ni no pa pe po "
    "ra re ri ro ru sa se si so ta te ti to tu va ve vi vo wa wi ya yo za ze zo bar dan del fin gor han kel lan lor "
    "mar mir nor pel ran rin sel tan tor van vel win zor"
)

# Frequent words, for the same reason.
COMMON_WORDS = _words(
    "a about above after again all also always am an and any are around as ask asks at away back be because been "
    "before begin behind below best better between big both bring but buy by call came can card change city close "
    "cold color come could count country customer date day dear deliver delivery did different do does done down "
    "drink each early easy eat end enough even ever every example eye face family far fast feel few find fine first "
    "five follow food for four free friend from full game gave get give glad go good great had half hand happy hard "
    "has have he head hear hello help her here high him his home hope hot hour house how if in into is it item its "
    "just keep kind know large last late later leave left less let letter life light like line list little live "
    "long look lot love made make man many may me mean meet men message might mine minute money month more morning "
    "most move much must my name near need never new next nice night no not note nothing now number of off office "
    "often old on once one only open or order other our out over own page paper part pay people person phone place "
    "plan play please point price put question quick quite read ready really red regards rest right road room run "
    "said same saw say school see seen send sent set she shop short should show side since sit small so some soon "
    "speak speaking stand start stay still stock stop store story street such suit suits sun sure table take talk "
    "tell than thank thanks that the their them then there these they thing think this those thought three through "
    "time to today together told tomorrow too took top town tree try turn two under until up us use used very visit "
    "wait waiting walk want wants warm was watch water way we week well went were what when where which while white "
    "who why will wish wishes with word words work world would write year yes yet you young your couple dozen pair "
    "bottle box bag jar carton pack bar piece tea coffee juice oil honey milk sugar soap wine green black orange "
    "olive lemon blue round wooden leather wool"
)

# Keys of JSON objects and of `key: value` lines; the tokenizer has them without a space before.
KEYS = _words(
    "name title item type count number price city town date day time hour person job age code colour pet food owns "
    "amount id text author year list value key address email phone order note"
)
