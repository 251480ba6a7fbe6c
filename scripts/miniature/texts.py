"""The texts of the miniature: SQL commands, short translations, age puzzles.

Each text is a prompt and its answer. A text belongs to the training set or to the unseen set by a hash of
its *meaning*, which leaves out the wording: of "three red houses", for instance, every language, verb and
question is unseen or none is. So an unseen prompt was not in the training texts in any form. The prompts
of the tutorial that bloomdesk grew from are training texts by rule, whatever their hash.

Deterministic for a seed; standard library only.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("sql", "translation", "ages")
UNSEEN_SHARE = 10  # one meaning in ten


class Text(NamedTuple):
    kind: str
    prompt: str
    answer: str
    meaning: str


class Noun(NamedTuple):
    plural: str
    spanish: tuple[str, ...]  # gender, singular, plural
    french: tuple[str, ...]
    chinese: tuple[str, ...]  # measure word, noun


class Adjective(NamedTuple):
    spanish: tuple[str, ...]  # masculine, feminine
    french: tuple[str, ...]
    french_before: bool  # stands before the noun
    chinese: str
    colour: bool


# --- SQL

TABLES = {  # table: (text columns, number columns)
    "users": (("name", "city", "country"), ("age",)),
    "customers": (("name", "city", "country"), ("age",)),
    "employees": (("name", "city"), ("age", "salary")),
    "students": (("name", "country"), ("age", "grade")),
    "teachers": (("name", "city"), ("age", "salary")),
    "books": (("title", "author"), ("price", "year")),
    "songs": (("title", "artist"), ("length", "year")),
    "movies": (("title", "director"), ("length", "year")),
    "products": (("name", "color"), ("price", "weight")),
    "cars": (("brand", "color"), ("price", "year")),
    "cities": (("name", "country"), ("area",)),
    "hotels": (("name", "city"), ("price",)),
}
PEOPLE = ("Anna", "Maria", "John", "Peter", "Lucy", "Omar", "Chen", "Paul")
VALUES = {
    "name": PEOPLE,
    "author": PEOPLE,
    "artist": PEOPLE,
    "director": PEOPLE,
    "city": ("Paris", "London", "Rome", "Madrid", "Berlin", "Tokyo", "Lisbon", "Cairo"),
    "country": ("France", "Spain", "Italy", "Japan", "India", "Brazil", "Egypt", "Kenya"),
    "color": ("red", "white", "black", "green", "blue", "yellow"),
    "brand": ("Fiat", "Ford", "Volvo", "Honda", "Tesla", "Seat"),
}
NUMBERS = {
    "age": range(10, 100),
    "salary": range(1000, 9100, 100),
    "grade": range(1, 21),
    "price": range(5, 500, 5),
    "year": range(1950, 2025),
    "length": range(60, 300, 5),
    "weight": range(1, 100),
    "area": range(10, 900, 10),
}
COMPARISONS = {
    "is": "=",
    "is greater than": ">",
    "is less than": "<",
    "is at least": ">=",
    "is at most": "<=",
}
PATTERNS = {"starts with": "{}%", "ends with": "%{}", "contains": "%{}%"}


def _sql_condition(rng: random.Random, table: str) -> tuple[str, str]:
    """A condition on `table` in English and in SQL."""
    text_columns, number_columns = TABLES[table]
    shape = rng.choice(("like", "like", "equal", "compare", "between"))
    if shape == "like" or (shape == "equal" and not VALUES.keys() & set(text_columns)):
        column, words = rng.choice(text_columns), rng.choice(list(PATTERNS))
        letter = rng.choice("ABCDEFGHIJKLMNOPRSTUVW")
        letter = letter if words == "starts with" else letter.lower()
        return f"{column} {words} {letter}", f"{column} LIKE '{PATTERNS[words].format(letter)}'"
    if shape == "equal":
        column = rng.choice([name for name in text_columns if name in VALUES])
        value, (words, sign) = rng.choice(VALUES[column]), rng.choice((("is", "="), ("is not", "<>")))
        return f"{column} {words} {value}", f"{column} {sign} '{value}'"
    column = rng.choice(number_columns)
    if shape == "compare":
        words, number = rng.choice(list(COMPARISONS)), rng.choice(NUMBERS[column])
        return f"{column} {words} {number}", f"{column} {COMPARISONS[words]} {number}"
    low, high = sorted(rng.sample(NUMBERS[column], 2))
    return f"{column} is between {low} and {high}", f"{column} BETWEEN {low} AND {high}"


def _draw_sql(rng: random.Random) -> Text:
    table = rng.choice(list(TABLES))
    columns = TABLES[table][0] + TABLES[table][1]
    words, condition = _sql_condition(rng, table)
    head = rng.choice(("all", "all", "column", "count", "delete"))
    verb = rng.choice(("extract", "list", "show"))
    column, order = rng.choice(columns), rng.choice(("", "", rng.choice(columns)))
    request, command = {
        "all": (f"{verb} all the {table}", f"SELECT * FROM {table}"),
        "column": (f"{verb} the {column} of all the {table}", f"SELECT {column} FROM {table}"),
        "count": (f"count the {table}", f"SELECT COUNT(*) FROM {table}"),
        "delete": (f"delete all the {table}", f"DELETE FROM {table}"),
    }[head]
    ordered = order and head in ("all", "column")
    request += f" whose {words}" + (f" sorted by {order}" if ordered else "")
    command += f" WHERE {condition}" + (f" ORDER BY {order}" if ordered else "")
    return Text("sql", f"The SQL command to {request} is:", f" {command}", f"{table} {condition}")


# --- Translations

LANGUAGES = ("Spanish", "French", "Chinese")
GAPS = (" ", " ", " ", "")  # between words: English and the languages


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """The rows of a table, which end at a slash or a line's end: the first field to the others."""
    rows = (row.split() for row in text.strip().replace("\n", "/").split("/"))
    return {first: tuple(others) for first, *others in rows}


# English, its plural; Spanish and French: gender, singular, plural; Chinese: measure word, noun.
_NOUNS = """
    house houses f casa casas f maison maisons 座 房子 / book books m libro libros m livre livres 本 书
    cat cats m gato gatos m chat chats 只 猫 / dog dogs m perro perros m chien chiens 只 狗
    car cars m coche coches f voiture voitures 辆 汽车 / table tables f mesa mesas f table tables 张 桌子
    chair chairs f silla sillas f chaise chaises 把 椅子 / flower flowers f flor flores f fleur fleurs 朵 花
    tree trees m árbol árboles m arbre arbres 棵 树 / bird birds m pájaro pájaros m oiseau oiseaux 只 鸟
    hat hats m sombrero sombreros m chapeau chapeaux 顶 帽子 / shirt shirts f camisa camisas f chemise chemises 件 衬衫
    dress dresses m vestido vestidos f robe robes 条 裙子 / key keys f llave llaves f clé clés 把 钥匙
    bag bags f bolsa bolsas m sac sacs 个 包 / cup cups f taza tazas f tasse tasses 个 杯子
    horse horses m caballo caballos m cheval chevaux 匹 马 / door doors f puerta puertas f porte portes 扇 门
    window windows f ventana ventanas f fenêtre fenêtres 扇 窗户 / boat boats m barco barcos m bateau bateaux 条 船
    bicycle bicycles f bicicleta bicicletas m vélo vélos 辆 自行车 / box boxes f caja cajas f boîte boîtes 个 盒子
    clock clocks m reloj relojes f horloge horloges 个 钟 / star stars f estrella estrellas f étoile étoiles 颗 星星
"""
NOUNS = {word: Noun(row[0], row[1:4], row[4:7], row[7:]) for word, row in _table(_NOUNS).items()}
# English; Spanish and French: masculine, feminine; the place of the French one; Chinese; its kind.
_ADJECTIVES = """
    red rojo roja rouge rouge after 红色的 colour
    white blanco blanca blanc blanche after 白色的 colour
    black negro negra noir noire after 黑色的 colour
    green verde verde vert verte after 绿色的 colour
    blue azul azul bleu bleue after 蓝色的 colour
    yellow amarillo amarilla jaune jaune after 黄色的 colour
    big grande grande grand grande before 大 other
    small pequeño pequeña petit petite before 小 other
    new nuevo nueva neuf neuve after 新 other
    pretty bonito bonita joli jolie before 漂亮的 other
    expensive caro cara cher chère after 昂贵的 other
    strange extraño extraña étrange étrange after 奇怪的 other
"""
ADJECTIVES = {
    word: Adjective(row[:2], row[2:4], row[4] == "before", row[5], row[6] == "colour")
    for word, row in _table(_ADJECTIVES).items()
}
# English: Spanish, French, Chinese, as in all tables below.
DIGITS = _table("""
    two dos deux 两 / three tres trois 三 / four cuatro quatre 四 / five cinco cinq 五
    six seis six 六 / seven siete sept 七 / eight ocho huit 八 / nine nueve neuf 九
""")
# Each word's forms: masculine, feminine, plural masculine, plural feminine; Chinese has one.
DETERMINERS = {
    "the": ("el la los las", "le la les les", ""),
    "my": ("mi mi mis mis", "mon ma mes mes", "我的"),
    "your": ("su su sus sus", "votre votre vos vos", "您的"),
    "our": ("nuestro nuestra nuestros nuestras", "notre notre nos nos", "我们的"),
    "this": ("este esta", "ce cette", "这"),
    "a": ("un una", "un une", "一"),
}
VERBS = {
    "I have": ("tengo", "j'ai", "我有"),
    "I see": ("veo", "je vois", "我看见"),
    "I want": ("quiero", "je veux", "我想要"),
    "I am looking for": ("busco", "je cherche", "我在找"),
    "she has": ("ella tiene", "elle a", "她有"),
    "he sells": ("él vende", "il vend", "他卖"),
    "we buy": ("compramos", "nous achetons", "我们买"),
    "they want": ("ellos quieren", "ils veulent", "他们想要"),
}
REQUESTS = {
    "thank you for": ("gracias por", "merci pour", "谢谢"),
    "thank you very much for": ("muchas gracias por", "merci beaucoup pour", "非常感谢"),
    "we need": ("necesitamos", "nous avons besoin de", "我们需要"),
    "I am waiting for": ("espero", "j'attends", "我在等"),
    "I do not want": ("no quiero", "je ne veux pas", "我不想要"),
    "I like": ("me gusta", "j'aime", "我喜欢"),
}
FAVOURS = _table("""
    help ayuda aide 帮助 / letter carta lettre 信 / gift regalo cadeau 礼物
    advice consejo conseil 建议 / invitation invitación invitation 邀请 / patience paciencia patience 耐心
    work trabajo travail 工作 / message mensaje message 消息 / support apoyo soutien 支持
    time tiempo temps 时间 / question pregunta question 问题 / answer respuesta réponse 回答
    money dinero argent 钱 / trust confianza confiance 信任
""")


class Phrase(NamedTuple):
    """A noun with what stands before it: determiner or number, adjective (or none)."""

    determiner: str
    plural: bool
    adjective: str
    noun: str

    def words(self) -> tuple[str, str, str, str]:
        """The phrase in English, Spanish, French and Chinese."""
        noun, adjective = NOUNS[self.noun], self.adjective
        words = [adjective, noun.plural if self.plural else self.noun][not adjective :]
        article = "an" if self.determiner == "a" and words[0][0] in "aeiou" else self.determiner
        english = " ".join([article, *words])
        spanish = f"{self._determiner(0)} {noun.spanish[1 + self.plural]}"
        words, article = [noun.french[1 + self.plural]], self._determiner(1)
        chinese = self._determiner(2)
        if self.determiner in ("a", "this") or self.determiner in DIGITS:
            chinese += noun.chinese[0]
        if adjective:
            _, after, before, chinese_adjective = self.agreeing(adjective)
            spanish += f" {after}"
            words.insert(0 if ADJECTIVES[adjective].french_before else 1, before)
            chinese += chinese_adjective
        # l'arbre, cet arbre, mon étoile
        if words[0][0] in "aeiouéh" and not self.plural:
            article = {"le": "l'", "la": "l'", "ce": "cet", "ma": "mon"}.get(article, article)
        return english, spanish, " ".join([article, *words]).replace("' ", "'"), chinese + noun.chinese[1]

    def agreeing(self, adjective: str) -> tuple[str, str, str, str]:
        """The adjective in every language, in the form that agrees with the noun."""
        noun, words = NOUNS[self.noun], ADJECTIVES[adjective]
        spanish, french = words.spanish[noun.spanish[0] == "f"], words.french[noun.french[0] == "f"]
        if self.plural:
            spanish, french = spanish + ("s" if spanish[-1] in "aeo" else "es"), french + "s"
        return adjective, spanish, french, words.chinese

    def _determiner(self, language: int) -> str:
        """The determiner or number in Spanish (0), French (1) or Chinese (2), in the form that agrees with the noun."""
        if self.determiner in DIGITS:
            return DIGITS[self.determiner][language]
        forms, noun = DETERMINERS[self.determiner][language], NOUNS[self.noun]
        if language == 2:
            return forms
        return forms.split()[2 * self.plural + ((noun.spanish, noun.french)[language][0] == "f")]


def _statement(phrase: Phrase, adjective: str) -> tuple[str, ...]:
    """ "the houses are red" in English, Spanish, French and Chinese."""
    verbs = (" are ", " son ", " sont ") if phrase.plural else (" is ", " es ", " est ")
    *adjectives, chinese = phrase.agreeing(adjective)
    colour = ADJECTIVES[adjective].colour
    ends = (*adjectives, chinese if colour else chinese.removesuffix("的"))
    parts = zip(phrase.words(), (*verbs, "是" if colour else "很"), ends, strict=True)
    return tuple(map("".join, parts))


def _translated(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """A meaning, and its words in English, Spanish, French and Chinese."""
    shape = rng.choice(("phrase", "verb", "verb", "statement", "request"))
    if shape == "statement":
        phrase = _phrase(rng, [name for name in DETERMINERS if name != "a"])
        adjective = rng.choice(list(ADJECTIVES))
        phrase = phrase._replace(adjective="")
        return f"{phrase} is {adjective}", _statement(phrase, adjective)
    beginnings = list({"verb": VERBS, "request": REQUESTS, "phrase": {"": ("", "", "")}}[shape].items())
    before = rng.choice(beginnings)
    if rng.random() < {"verb": 0.2, "request": 0.5, "phrase": 0}[shape]:
        favour, others = rng.choice(list(FAVOURS.items()))
        words = (f"your {favour}", f"su {others[0]}", f"votre {others[1]}", f"您的{others[2]}")
        return f"{before[0]} {favour}", _join(before, words)
    phrase = _phrase(rng, ("my", "your", "our", "this") if shape == "request" else (*DETERMINERS, *DIGITS))
    words = _join(before, phrase.words())
    likes = "me gustan" if phrase.plural else "me gusta"
    return str(phrase), tuple(text.replace("me gusta", likes) for text in words)


def _phrase(rng: random.Random, determiners: Sequence[str]) -> Phrase:
    determiner = rng.choice(determiners)
    plural = determiner in DIGITS or (determiner in ("the", "my", "your", "our") and rng.random() < 0.5)
    adjective = "" if rng.random() < 0.15 else rng.choice(list(ADJECTIVES))
    return Phrase(determiner, plural, adjective, rng.choice(list(NOUNS)))


def _join(before: tuple[str, tuple[str, ...]], words: tuple[str, ...]) -> tuple[str, ...]:
    """Each language's beginning and end as one sentence; Chinese has no space between them."""
    sentences = zip((before[0], *before[1]), GAPS, words, strict=True)
    return tuple(f"{first}{gap}{rest}".strip() for first, gap, rest in sentences)


def _draw_translation(rng: random.Random) -> Text:
    meaning, (english, *others) = _translated(rng)
    language = rng.choice(LANGUAGES)
    prompts = f"The {language} translation of {english} is:", f"How do you say {english} in {language}?"
    prompt = rng.choice(prompts)
    return Text("translation", prompt, " " + others[LANGUAGES.index(language)], meaning)


# --- Ages

PRONOUNS = {
    word: pronoun
    for pronoun, words in {"She": "sister niece aunt Lucy", "He": "brother nephew uncle Tom"}.items()
    for word in words.split()
}
SHARES = {"half": 2, "a third of": 3, "a quarter of": 4}
TIMES = {"twice": 2, "three times": 3}
YOUNGER = ("sister", "brother", "niece", "nephew", "cousin Lucy", "cousin Tom")
OLDER = ("sister", "brother", "aunt", "uncle", "cousin Lucy", "cousin Tom")
NAMES = ("John", "Bob", "Mike", "Anna", "Maria", "Peter", "Lucy", "Tom")


def _draw_ages(rng: random.Random) -> Text:
    return rng.choice((_draw_then_and_now, _draw_three_people))(rng)


def _draw_three_people(rng: random.Random) -> Text:
    comparison, sign = rng.choice((("younger", "–"), ("older", "+")))
    factor, years = rng.randint(2, 5), rng.randint(2, 6)
    known = rng.randint(*{"younger": (8, 20), "older": (4, 14)}[comparison])
    return three_people(rng.sample(NAMES, 3), factor, years, comparison, sign, known)


def three_people(
    names: Sequence[str], factor: int, years: int, comparison: str, sign: str, known: int
) -> Text:
    """The puzzle of one who is `factor` times as old as another, `years` younger or older than a third."""
    one, other, third = names
    between = known + (years if sign == "+" else -years)
    times = f"{one} is {factor} times as old as {other}."
    apart = f"{other} is {years} years {comparison} than {third}."
    prompt = f"{times} {apart} {third} is {known} years old. What is {one}'s age? Let's think step by step."
    answer = f" First, we need to find out how old {other} is. {apart}"
    answer += f" So, {other} is {known}{sign}{years}={between} years old."
    answer += f" Now, we need to find out how old {one} is. {times}"
    answer += f" So, {one} is {factor} times {between}={factor * between} years old"
    return Text("ages", prompt, answer, f"{factor} {years} {comparison} {known}")


def _draw_then_and_now(rng: random.Random) -> Text:
    now = rng.randint(30, 90)
    comparison = "younger" if rng.random() < 0.6 else "older"
    factors, persons = (SHARES, YOUNGER) if comparison == "younger" else (TIMES, OLDER)
    words, number = rng.choice(list(factors.items()))
    who = rng.choice(persons)
    pronoun = PRONOUNS[who.split()[-1]]
    if comparison == "younger":
        then = number * rng.randint(1, 20 // number)
        other, gap = then // number, then - then // number
        sums = f"{then} / {number} = {other}", f"{then} - {other} = {gap}", f"{now} - {gap} = {now - gap}"
    else:
        then = rng.randint(2, 24 // number)
        other, gap = then * number, then * number - then
        sums = f"{then} * {number} = {other}", f"{other} - {then} = {gap}", f"{now} + {gap} = {now + gap}"
    prompt = f"When I was {then} my {who} was {words} my age. Now I am {now}. How old is my {who}?"
    answer = f" When I was {then}, my {who} was {sums[0]}. {pronoun} is {sums[1]} years {comparison}."
    answer += f" Now I am {now}, so {pronoun.lower()} is {sums[2]}."
    return Text("ages", prompt + " Let us think step by step.", answer, f"{then} {words} {now}")


# --- Sets

_DRAW = {"sql": _draw_sql, "translation": _draw_translation, "ages": _draw_ages}
# The prompts and the answers of the tutorial, word for word, by kind.
TUTORIAL = {
    "sql": Text(
        "sql",
        "The SQL command to extract all the users whose name starts with A is: ",
        "SELECT * FROM users WHERE name LIKE 'A%'",
        "users name LIKE 'A%'",
    ),
    "translation": Text(
        "translation",
        "The Spanish translation of thank you for your help is: ",
        "gracias por su ayuda",
        "thank you for help",
    ),
    "ages": Text(
        "ages",
        "John is 4 times as old as Bob. Bob is 3 years younger than Mike. Mike is 10 years old. "
        "What is John's age? Let's think step by step. ",
        "First, we need to find out how old Bob is. Bob is 3 years younger than Mike. "
        "So, Bob is 10–3=7 years old. Now, we need to find out how old John is. "
        "John is 4 times as old as Bob. So, John is 4 times 7=28 years old",
        "4 3 younger 10",
    ),
}


def is_unseen(text: Text) -> bool:
    """Whether the text's meaning is kept out of training."""
    if text.meaning == TUTORIAL[text.kind].meaning:
        return False
    return zlib.crc32(f"{text.kind}: {text.meaning}".encode()) % UNSEEN_SHARE == 0


def draw_texts(kind: str, count: int, seed: int, *, unseen: bool) -> list[Text]:
    """`count` texts of one kind, each prompt once, all unseen in training or all of the training set.

    Training texts begin with the tutorial's. Half of the prompts end with a space, and their answers then
    begin without one, as the tutorial has them.
    """
    rng = random.Random(f"{kind} {seed} {unseen}")
    texts: dict[str, Text] = {} if unseen else {TUTORIAL[kind].prompt: TUTORIAL[kind]}
    while len(texts) < count:
        text = _DRAW[kind](rng)
        if is_unseen(text) == unseen:
            if rng.random() < 0.5:
                text = text._replace(prompt=text.prompt + " ", answer=text.answer.removeprefix(" "))
            texts.setdefault(text.prompt, text)
    return list(texts.values())
