"""Texts on which tokenizers are compared: what people write, and what breaks tokenizers."""

from __future__ import annotations

PLAIN = [
    "The quick brown fox jumps over the lazy dog. It isn't what they've said, I'll bet you'd agree.",
    "Write a short letter to Anna about the trip on 14 March 2025; the train leaves at 08:45.",
    "今天天气很好，我们去公园散步吧。法国的首都是巴黎。",
    "请用中文写一段话，介绍一下人工智能的发展历史（不少于200字）。",
    "我想在apple工作1314151天～",
    "Mixed: 我在London学习machine learning，已经3年了！",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3",
    'for (int i = 0; i < 10; ++i) {\n\tstd::cout << "x[" << i << "] = " << x[i] << \'\\n\';\n}',
    '{"name": "Li Lei", "age": 30, "tags": ["a", "b"], "ok": true}',
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- one\n- two\n\n1. first\n2. second",
    "https://example.com/path?query=1&other=%20x#anchor mailto:someone@example.org",
    "Prices: $3.50, €1.234,56, £0.99 and ¥12000; 50% off, 3/4 cup, 10^6, 1e-9, x²+y²=z².",
    "Привет, как дела? Ça va très bien, merci. ¿Dónde está la biblioteca? Über straße.",
    "日本語のテキストと한국어 텍스트, العربية וגם עברית, हिन्दी में पाठ, ข้อความภาษาไทย",
    "User: hello\nAssistant: hi there!\n\nUser: who are you?\nAssistant:",
]

TORTURE = [
    "",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "\n",
    "\n\n\n",
    "\t\ttabs\t and \r\n windows\r\nlines\r",
    " \n \n\n   \n",
    "a  b   c    d     e",
    "word\u00a0nbsp\u2003em\u3000wide",
    "🙂🚀 family: 👨‍👩‍👧‍👦 flags: 🇨🇳🇫🇷 skin: 👍🏽 (normal) 😶‍🌫️",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 ١٢٣ Ⅷ ½",
    "'''''' ``````\"\"\"\"......!!!!!!??????------=======",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL",
    "CamelCaseWords and snake_case_words and SCREAMING_CASE and kebab-case",
    "空格 在 中文 之间  有两个   三个",
    "，。！？；：“”‘’（）【】《》、…—",
    "a你b好c，d！e",
    "\ufeffBOM and \u200bzero\u200dwidth\u00ad",
    "controls \x01\x02\x1f end",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠮷野家 𝟘𝟙𝟚",
    '<div class="x">&nbsp;</div> <!-- c --> </s> <s> <unk> [INST] [/INST] <|x|>',
    "x" * 200,
    "ab" * 50 + "!" * 40 + " " * 30 + "\n" * 10,
]

CORPUS = [*PLAIN, *TORTURE]
