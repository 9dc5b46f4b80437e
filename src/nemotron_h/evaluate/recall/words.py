"""Words that texts are made of, from a seed: sentences without a fact or a digit, keys, and names that nobody has."""

from collections.abc import Iterator
from random import Random


def listed(text: str, between: str | None = None) -> list[str]:
    return [word.strip() for word in text.split(between)]


ADJECTIVES = listed(
    """
    amber ancient bitter blue bold brass brave bright broad broken bronze busy calm careful cheap clean clever cold
    copper crisp curious damp dark dear deep distant dry dull dusty early eager empty even faint fair famous fast fine
    firm flat fond fresh gentle glad golden grand gray green happy hard heavy high hollow honest humble icy iron jolly
    keen kind large late lazy lean light little lively lonely long loose loud low lucky marble mild modest narrow neat
    new noble odd old orange pale patient plain polite poor proud pure quick quiet rapid rare red rich ripe rough
    round royal rusty sad safe salty sharp short shy silent silver simple slim slow small smooth soft solid sour
    stable steady steep stiff strange strict strong sudden sunny sweet swift tall tame tender thick thin tidy tiny
    tired tough vast velvet violet warm weak wet white wide wild wise wooden yellow young
    """
)
NOUNS = listed(
    """
    anchor apple arrow attic badge bakery ballad banner barge barrel basket beacon bell bench bicycle blanket boat
    book bottle bridge brook broom bucket button cabin cable camera candle canoe canyon carpet castle cellar chain
    chair chapel cherry chest circle clock cloud coat coin comet compass copper corner cottage cradle crown curtain
    desert diary dish door dragon drawer drum eagle engine falcon farm feather fence ferry field flag flute forest
    fork fountain garden gate glacier globe glove grain guitar hammer harbor harp hat hill horn horse hotel island
    jacket jar journal kettle key kite ladder lake lamp lantern leaf lemon letter library lighthouse lion lock mango
    map market mask meadow mill mirror moon mountain museum napkin needle nest notebook oak oar ocean olive orchard
    organ oven owl paddle palace panel paper parrot path pearl pebble pencil piano picture pillow pine pipe planet
    plate pocket pond porch postcard pot prairie puzzle quarry quilt rabbit radio raft railway rake raven ribbon ring
    river road robe rocket roof rope rose saddle sail salt sandal scarf school sculpture shelf shell ship shoe shore
    shovel sign sled smith spoon spring square stable stamp star statue stone store stove street suitcase summit swan
    table tailor tavern temple tent theater thread ticket tiger timber torch tower trail train tray tree trumpet
    tunnel umbrella valley vase vessel village vine violin wagon wall watch well wheel willow window winter wolf wool
    yard
    """
)
VERBS = listed(
    """
    answers approaches avoids blames borrows brings builds calls carries catches chases chooses covers crosses
    describes draws drops enters finds follows forgets greets guards hears helps hides holds joins keeps leaves lends
    likes lifts loses meets mends misses moves needs opens orders paints passes pays praises prepares pulls pushes
    reaches reads recalls repairs returns sees sells shares shows sketches spares studies teaches thanks touches
    trusts visits waits washes watches wears welcomes
    """
)
PLACES = listed(
    """
    after the rain | before noon | behind the hill | beside the water | by the roadside | during the night | for a while
    | in the afternoon | in the evening | in the north | near the coast | on the way home | once again | over the winter
    | some days later | the other day | under the roof | until the morning | with great care | without a word
    """,
    "|",
)

ONSETS, VOWELS, ENDS = "bdfghjklmnprstvz", "aeiou", "lmnrsx"


def sentences(rng: Random) -> Iterator[str]:
    """Sentences that say nothing anybody asks for, no digit in them, without end."""
    while True:
        first, second = rng.choice(ADJECTIVES), rng.choice(ADJECTIVES)
        subject, thing = rng.choice(NOUNS), rng.choice(NOUNS)
        yield f"The {first} {subject} {rng.choice(VERBS)} the {second} {thing} {rng.choice(PLACES)}."


def keys(rng: Random) -> Iterator[str]:
    """`golden-harbor`, each once; when there are no more, `golden-rusty-harbor`."""
    for place in _shuffled(rng, len(ADJECTIVES) * len(NOUNS)):
        adjective, noun = divmod(place, len(NOUNS))
        yield f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"
    for place in _shuffled(rng, len(ADJECTIVES) ** 2 * len(NOUNS)):
        pair, noun = divmod(place, len(NOUNS))
        first, second = divmod(pair, len(ADJECTIVES))
        yield f"{ADJECTIVES[first]}-{ADJECTIVES[second]}-{NOUNS[noun]}"


def numbers(rng: Random, digits: int = 7) -> Iterator[str]:
    """Numbers of so many digits, each once, as long as there are any."""
    for number in _shuffled(rng, 9 * 10 ** (digits - 1)):
        yield str(10 ** (digits - 1) + number)


def names(rng: Random) -> Iterator[str]:
    """`Dakolim`: coined, each once, and all of one length, so that none is part of another."""
    syllables = [onset + vowel for onset in ONSETS for vowel in VOWELS]
    for place in _shuffled(rng, len(syllables) ** 3 * len(ENDS)):
        rest, end = divmod(place, len(ENDS))
        rest, third = divmod(rest, len(syllables))
        first, second = divmod(rest, len(syllables))
        yield (syllables[first] + syllables[second] + syllables[third] + ENDS[end]).capitalize()


def _shuffled(rng: Random, count: int) -> Iterator[int]:
    """0..count-1 in an order of its own, and the same first ones however many are taken."""
    moved: dict[int, int] = {}  # Fisher and Yates, of which only what has been swapped is held
    for place in range(count):
        other = rng.randrange(place, count)
        yield moved.get(other, other)
        moved[other] = moved.pop(place, place)
