"""Words and what belongs to them."""

_POSITIVE = """ admirable adorable amazing amusing awesome beautiful beloved blissful brave bright brilliant
calm caring charming cheerful clever comfortable courageous cozy creative delicious delightful eager elegant
enchanting excellent exciting fabulous fair faithful fantastic fearless festive flawless friendly funny
generous gentle glad gorgeous graceful grateful great happy harmonious healthy heroic honest hopeful ideal
impressive inspiring joyful jolly kind lovely loyal lucky luxurious magical magnificent marvelous merry nice
noble optimistic outstanding patient peaceful perfect playful pleasant polite precious pretty proud pure
radiant refreshing relaxing reliable remarkable romantic safe satisfying sincere skillful smart sparkling
splendid strong stunning successful superb sweet tender terrific thankful thoughtful thrilling tidy
trustworthy valuable vibrant victorious warm welcoming wise witty wonderful worthy
"""
_NEGATIVE = """
abusive afraid aggressive angry annoying anxious arrogant ashamed awful awkward bad bitter bleak boring
broken brutal careless chaotic cheap clumsy cold corrupt cowardly cruel damaged dangerous deadly defective
depressing desperate dirty disappointing disastrous disgusting dishonest dismal dreadful dull evil failing
faulty fearful filthy foolish frightening frustrating gloomy greedy grim gross guilty harmful harsh hateful
heartless hopeless horrible hostile hurtful ignorant inferior insulting jealous lazy lonely lousy mean messy
miserable moody nasty nervous noisy offensive painful pathetic poisonous poor reckless rotten rude ruthless
sad scary selfish shameful sick sinister sloppy smelly sour stupid terrible toxic tragic ugly unfair unhappy
unpleasant unreliable useless vicious vile violent weak wicked worthless wretched
"""
FEELINGS = [(word, "positive") for word in _POSITIVE.split()] + [
    (word, "negative") for word in _NEGATIVE.split()
]

_PAST = """
arrive/arrived ask/asked bake/baked become/became begin/began believe/believed bend/bent bite/bit blow/blew
borrow/borrowed break/broke bring/brought build/built burn/burned buy/bought call/called carry/carried
catch/caught change/changed choose/chose clean/cleaned climb/climbed close/closed come/came cook/cooked
cry/cried dance/danced decide/decided deliver/delivered dig/dug discover/discovered do/did draw/drew
dream/dreamed drink/drank drive/drove drop/dropped earn/earned eat/ate enjoy/enjoyed enter/entered
explain/explained fall/fell feed/fed feel/felt fight/fought find/found finish/finished fix/fixed fly/flew
follow/followed forget/forgot forgive/forgave freeze/froze get/got give/gave go/went grow/grew hang/hung
happen/happened hear/heard help/helped hide/hid hold/held hope/hoped imagine/imagined invite/invited
join/joined jump/jumped keep/kept kick/kicked know/knew laugh/laughed lead/led learn/learned leave/left
lend/lent like/liked listen/listened live/lived look/looked lose/lost love/loved make/made marry/married
mean/meant meet/met melt/melted miss/missed move/moved need/needed notice/noticed offer/offered open/opened
order/ordered paint/painted pay/paid plan/planned plant/planted play/played promise/promised pull/pulled
push/pushed rain/rained reach/reached receive/received remember/remembered repair/repaired return/returned
ride/rode ring/rang rise/rose run/ran save/saved say/said see/saw sell/sold send/sent shake/shook
share/shared shine/shone shoot/shot shout/shouted sing/sang sink/sank sit/sat sleep/slept smell/smelled
smile/smiled speak/spoke spend/spent stand/stood start/started stay/stayed steal/stole stop/stopped
study/studied swim/swam take/took talk/talked teach/taught tell/told think/thought throw/threw touch/touched
travel/traveled try/tried understand/understood use/used visit/visited wait/waited wake/woke walk/walked
want/wanted wash/washed watch/watched wear/wore win/won wish/wished work/worked worry/worried write/wrote
"""
PAST = [tuple(pair.split("/")) for pair in _PAST.split()]
