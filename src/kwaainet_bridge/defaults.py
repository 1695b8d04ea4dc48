"""Every number of the node, with its unit and why it is what it is. YAML overrides those that it names."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

KEPT_FREE_BYTES: Final = 64 * MIB
"""Freed memory that a process keeps for what it needs next instead of giving it back. The most that glibc
comes to by itself, after it has seen blocks of half this size."""

# --- rpc ------------------------------------------------------------------------------------------------

MAX_UNARY_BYTES: Final = 4 * MIB
"""Longest body of a unary message. Stock daemons drop anything longer without an answer (4194304 exactly)."""

MAX_FRAME_BYTES: Final = 256 * MIB
"""Longest streamed message accepted. Stock peers cut tensors into 4 MiB parts and know no limit."""

STREAM_PART_BYTES: Final = 4 * MIB
"""Tensor bytes in one streamed message: what stock clients and servers use."""

MAX_PART_BYTES: Final = 16 * MIB
"""Longest message that carries a part of a tensor: four times what stock peers send."""

READ_AHEAD_MESSAGES: Final = 5
"""Requests of one stream that wait for their handler; beyond that the peer's window closes (stock: 5)."""

READ_AHEAD_BYTES: Final = 4 * MIB
"""Bytes of one stream's requests that wait for their handler, plus one request of any size."""

PEER_RECEIVE_BYTES: Final = 512 * MIB
"""Bytes of one peer's requests and unread answers in memory: eight concurrent training requests of 1024 tokens
of hidden size 8192 with gradients, what a stock client makes of a large batch."""

PEER_ALLOWANCE_BYTES: Final = 256 * KIB
"""What every peer may have of that whatever others hold: DHT calls and one-token steps."""

RECEIVE_BYTES: Final = 1024 * MIB
"""The same for all peers together. A peer that would exceed either is cut off, not the node."""

MAX_ERROR_CHARACTERS: Final = 1000
"""Longest error text that is sent. Peers choose part of some, and a caller never gets an answer over 4 MiB."""

FIRST_REQUEST_SECONDS: Final = 60.0
"""A peer that opens a stream and stays silent is dropped after this long."""

SEND_SECONDS: Final = 180.0
"""A server drops a caller that reads nothing of an answer for this long (stock clients wait 180 s for one)."""

CLOSE_GRACE_SECONDS: Final = 5.0
"""How long a server that has nothing more to say waits for the caller's end-of-stream before it closes."""

# --- wire ----------------------------------------------------------------------------------------------------

MAX_MSGPACK_BYTES: Final = MAX_UNARY_BYTES
"""Longest msgpack value accepted: all of them arrive inside unary messages or in the metadata of a step."""

MAX_MSGPACK_DEPTH: Final = 64
"""Levels of containers in a msgpack value. What stock peers send has fewer than 10."""

MAX_MSGPACK_ITEMS: Final = 1 << 16
"""Items in all containers of one msgpack value. A DHT record of a thousand servers has some 3,000."""

MAX_MESSAGE_FIELDS: Final = 64
"""Fields of one expert message or tensor. A request carries 2 to 5 tensors; a tensor has 6 fields, 21 if its
dimensions come one by one. These are read by Python code: it bounds to 10 ms how long one message keeps the loop."""

MAX_UID_BYTES: Final = 256 * KIB
"""Longest uid of an expert request: a chain of 1024 blocks under a prefix of 200 characters. Text may take four times
the memory of its bytes."""

MAX_TENSOR_ELEMENTS: Final = 1 << 31
"""Elements of one tensor. Far above what a step carries; it keeps products of dimensions within 64 bits."""

MAX_TENSOR_DIMENSIONS: Final = 16
"""Dimensions of one tensor. Steps carry 3, prompts 4."""

MAX_JOINED_TENSORS: Final = 1 << 14
"""Tensors in one stream. A forward call carries 2 to 5, an averager's state as many as its model has."""

# --- wire: KwaaiNet ------------------------------------------------------------------------------------------

MAX_MUX_FRAME_BYTES: Final = 64 * MIB
"""Longest frame of the mux protocol; KwaaiNet's peers accept as much. A bridge may be given less: a body that comes
as integers takes 20 ns a byte to read, 0.8 s for the longest."""

MAX_TENSOR_FRAME_BYTES: Final = 64 * MIB
"""Longest frame of /kwaai/tensor/1.0.0, whose own reader knows no limit: 60 million values in 8 bits."""

MAX_MODEL_NAME_BYTES: Final = 1 * KIB
"""Name of a model in a request for a lease. Those of the hub have up to 200 characters."""

MAX_HTTP_METHOD_BYTES: Final = 32
"""HTTP method of a tunnelled request. The longest registered one has 17."""

MAX_HTTP_PATH_BYTES: Final = 8 * KIB
"""Path and query of a tunnelled request: what HTTP servers accept of a request line."""

MAX_TENSOR_TEXT_BYTES: Final = 64 * KIB
"""Name or metadata of a tensor message. The example sends a word."""

MAX_TENSOR2_PART_BYTES: Final = MIB
"""Values in one part of /kwaai/tensor/2.0.0: what a receiver holds of a frame before it knows whose it is."""

MAX_TENSOR2_INLINE_BYTES: Final = 64 * KIB
"""Values that an offer of that protocol may carry itself: four tokens of the largest models in 16 bits. They have
travelled in vain if they are not wanted."""

MAX_TENSOR2_OFFER_BYTES: Final = 32 * KIB
"""An offer without values. Sixteen may wait in memory."""

MAX_TENSOR2_NAME_BYTES: Final = KIB
"""Name of a tensor, UTF-8. Parameters of large models have up to 100."""

MAX_TENSOR2_METADATA: Final = 64
"""Entries of an offer's metadata."""

MAX_TENSOR2_TEXT_BYTES: Final = 4 * KIB
"""Text of an acknowledgement or an end; MAX_ERROR_CHARACTERS take that at most."""

MAX_HELLO_BYTES: Final = 4 * KIB
"""A text for the people who run a node: a page."""

# --- net ------------------------------------------------------------------------------------------------

DIAL_SECONDS: Final = 10.0
"""One address: name resolution, TCP, noise and yamux together. Stock daemons allow 60 s for all addresses."""

DIAL_STAGGER_SECONDS: Final = 0.25
"""The next address of a peer is tried beside the first after this long (RFC 8305), at once after a failure."""

MAX_DIAL_ADDRESSES: Final = 16
"""Addresses of one peer that one dial tries; peers behind several interfaces announce about ten."""

MAX_ENDPOINTS_PER_NAME: Final = 8
"""Addresses tried of those that a name resolves to: a stranger's name may resolve to any number."""

DIAL_BACKOFF_SECONDS: Final = 2.0
"""An address that failed is left alone for up to this long; the bound doubles with each further failure. Less than
a client's second pause between tries (stock daemons: 5 s)."""

DIAL_MAX_BACKOFF_SECONDS: Final = 120.0
"""Where that doubling ends: a server that comes back is found within two minutes (stock daemons: 5 minutes)."""

MAX_DIALLED_PEERS: Final = 2048
"""Peers whose dial results are kept; the one dialled longest ago is forgotten first."""

MAX_ADDRESSES_PER_PEER: Final = 32
"""Addresses kept for one peer: what a peer says of itself must not grow without bound."""

MAX_KNOWN_PEERS: Final = 10_000
"""Peers whose addresses are kept; the one heard of longest ago is forgotten first."""

HANDSHAKE_SECONDS: Final = 10.0
"""An inbound connection that has not finished noise and yamux by then is closed."""

NEGOTIATION_SECONDS: Final = 10.0
"""An inbound stream that has not agreed on a protocol by then is reset."""

MAX_HANDSHAKES: Final = 256
"""Connections whose peer has not proved who it is. Beyond that new ones are refused until some have."""

MAX_HANDSHAKES_PER_ADDRESS: Final = 16
"""Those of one public IPv4 address or IPv6 /64. A handshake takes 10 ms, and 10 s at most."""

OVERFLOW_HANDSHAKES: Final = 64
"""Handshakes beyond MAX_CONNECTIONS: idle connections make room only for peers that have proved who they are."""

RESOLVER_THREADS: Final = 8
"""Names of hosts that are looked up at one time, those included that nobody waits for any more: one holds a thread
until the system's resolver gives up, half a minute with three silent servers. trio has 40 threads for everybody."""

SPARE_DESCRIPTORS: Final = 256 + OVERFLOW_HANDSHAKES
"""File descriptors kept free of connections: files, listeners, libraries, and handshakes of a full host."""

MAX_CONNECTIONS: Final = 2000
"""Connections at one time, handshakes included; about 140 KiB each while idle."""

HIGH_CONNECTIONS_SHARE: Final = 0.8
"""High watermark as a share of the connections allowed: the rest is for bursts, which end within the grace period."""

LOW_CONNECTIONS_SHARE: Final = 0.6
"""Low watermark: far enough below the high one that idle connections are closed in batches, not one by one."""

STRANGERS_SHARE: Final = 0.1
"""Connections kept for peers that are in no network of this host, as a share of those allowed: 200 neighbours are more
than a lookup in a public Kademlia network asks."""

CONNECTION_GRACE_SECONDS: Final = 30.0
"""A younger connection is neither closed for being idle nor taken for a stranger's: identify and a first call take a
few round trips, and a peer that was asked to dial back some seconds more."""

MAX_CONNECTIONS_PER_ADDRESS: Final = 64
"""Inbound connections from one public IPv4 address or IPv6 /64. A university's or carrier's NAT hides dozens
of volunteers; 31 addresses are needed to fill a host."""

TEND_SECONDS: Final = 1.0
"""How often connections that are to be closed are looked at, while there are any."""

RETIREMENT_SECONDS: Final = 1.0
"""Between asking a peer to open no more streams and closing: a stream that crosses the request on its way is
served. Longer would leave stock daemons with a connection that they choose and cannot use."""

SURPLUS_SECONDS: Final = 5.0
"""A second connection to one peer is closed when unused for this long, by the side with the smaller peer id."""

SURPLUS_OF_OTHERS_SECONDS: Final = 30.0
"""The same by the other side, which lets the first decide: stock daemons never close any."""

MAX_CONNECTIONS_PER_PEER: Final = 8
"""A peer that restarts leaves dead connections for a while; beyond this the oldest idle one is closed."""

MAX_PROTOCOL_ID_BYTES: Final = 1024
"""A multistream message. Hivemind's longest are a run id and a class name."""

MAX_PROTOCOL_PROPOSALS: Final = 32
"""Protocols that one peer may propose on one stream."""

MAX_STREAMS: Final = 4096
"""Streams opened by peers that are served at one time, their initial windows being all of STREAM_BUFFER_BYTES.
A task and its stream take some 10 KiB."""

MAX_STREAMS_PER_PEER: Final = 512
"""The same of one peer. Stock daemons open no more than 256 that are not accepted yet."""

MAX_STREAMS_PER_PROTOCOL: Final = 2048
"""The same of one protocol, so that a slow handler does not stand in the way of other protocols."""

MAX_STREAMS_PER_PROTOCOL_AND_PEER: Final = 256
"""The same of one protocol and peer: as many as MAX_SESSIONS_PER_PEER."""

STREAM_BUFFER_BYTES: Final = 1024 * MIB
"""What peers may have on its way to streams of theirs that are not read: 256 KiB for each, and what windows have
grown by. Most of it is a promise that is never called in."""

MAX_INBOUND_STREAMS: Final = 1024
"""Streams that one peer may hold open on one connection, those that have been served included; further ones
are reset."""

MAX_UNACKNOWLEDGED_STREAMS: Final = 256
"""Streams opened but not yet accepted: go-yamux resets those beyond its accept backlog of 256."""

MAX_STREAM_WINDOW_BYTES: Final = 16 * MIB
"""Receive window of one stream after it has grown; the same as go-libp2p's."""

WINDOW_GROWTH_BYTES: Final = 64 * MIB
"""What all windows of one connection together may grow beyond their initial 256 KiB each."""

SEND_QUEUE_BYTES: Final = MIB
"""Bytes of one connection that wait for the socket before writers wait too."""

STREAM_SHARE_BYTES: Final = 128 * KIB
"""A stream that has put this much into one write of its connection waits for the next, so that a step of another
stream is behind two shares of a transfer at most. Also the longest data frame. Larger shares gain no speed, and
windows are multiples of it: others would leave a small frame at the end of each."""

MIN_STREAM_SHARE_BYTES: Final = 4 * KIB
"""Where that share stops shrinking as more streams wait than SEND_QUEUE_BYTES has room for: 256 of these fill it."""

UNREAD_CONTROL_BYTES: Final = 4 * MIB
"""A peer that provokes answers (pings, resets) and reads none of them is dropped at this much queued."""

KEEP_ALIVE_SECONDS: Final = 30.0
"""Between keep-alive pings, and how long one may go unanswered; stock daemons ping as often."""

CLOSED_STREAM_SECONDS: Final = 60.0
"""A stream that this side closed and the peer did not is reset after this long."""

ABANDONED_WRITE_SECONDS: Final = 10.0
"""A write to a peer that closed its side and grants no more window fails after this long."""

LAST_WORDS_SECONDS: Final = 1.0
"""How long a closing connection waits for what is queued to leave."""

MAX_IDENTIFY_BYTES: Final = 64 * KIB
"""What a peer says of itself; stock messages are under 2 KiB."""

IDENTIFY_PUSH_SECONDS: Final = 0.5
"""Between a change of what this host says of itself and the push: a node mounts its calls one after another."""

IDENTIFY_PUSHES_AT_ONCE: Final = 32
"""Peers that are told at the same time; a host with 2000 connections tells all of them within seconds."""

MAX_PROTOCOLS_PER_PEER: Final = 1024
"""Protocols kept of those that a peer says it serves; a stock server with several averagers has about 30."""

PING_IDLE_SECONDS: Final = 60.0
"""A ping stream without a ping is closed after this long, as go-libp2p does."""

KAD_BUCKET_PEERS: Final = 20
"""Peers in a Kademlia answer and peers a lookup returns: the network's k."""

KAD_CONCURRENCY: Final = 10
"""Peers asked at a time in one lookup, as stock daemons do."""

KAD_REQUEST_SECONDS: Final = 10.0
"""One Kademlia question and its answer."""

KAD_IDLE_SECONDS: Final = 60.0
"""A Kademlia stream without a request is closed after this long (go-libp2p-kad-dht: 1 minute)."""

MAX_KAD_MESSAGE_BYTES: Final = 256 * KIB
"""20 peers with 32 addresses each make about 30 KiB; stock daemons accept 4 MiB."""

INTERFACES_SECONDS: Final = 60.0
"""How often a host that listens on all interfaces looks which addresses they have; leases and networks change."""

AUTONAT_DIAL_SECONDS: Final = 15.0
"""One dial-back by AutoNAT. One that fails takes all of it, whatever the reason (go-libp2p: 15 s, likewise)."""

AUTONAT_SECONDS: Final = 30.0
"""A question of AutoNAT and its answer: one dial-back, and as long for connecting and reading."""

AUTONAT_DIALS_AT_ONCE: Final = 8
"""Dial-backs at one time: as many as can fail within half of the period."""

AUTONAT_PERIOD_SECONDS: Final = 60.0
"""Dial-backs are counted over this long (go-libp2p: 1 minute)."""

AUTONAT_DIALS: Final = 30
"""Dial-backs in a period, for all peers together (go-libp2p: 30). Identities cost nothing, so this is what bounds the
connections that strangers can make this host open."""

AUTONAT_DIALS_PER_PEER: Final = 3
"""The same of one peer (go-libp2p: 3), so that one that asks all the time leaves some for others."""

MAX_AUTONAT_ADDRESSES: Final = 16
"""Addresses named in a question, and ports tried for one (go-libp2p: 16)."""

MAX_AUTONAT_BYTES: Final = 4 * KIB
"""A message of AutoNAT; go-libp2p accepts no more."""

MAX_AUTONAT_CHARACTERS: Final = 200
"""Kept of a peer's explanation why it does not dial."""

MAX_MEASURED_BYTES: Final = 16 * 1024 * MIB
"""Bytes that one measurement of a connection's speed may send each way."""

BOOTSTRAP_RETRY_SECONDS: Final = 2.0
"""Upper bound of the first random wait before an unreachable bootstrap address is tried again; it doubles."""

BOOTSTRAP_MAX_RETRY_SECONDS: Final = 300.0
"""Where that bound stops doubling."""

MAX_OBSERVERS: Final = 64
"""Peers whose view of this host's address is remembered, the latest."""

MAX_SUPPOSED_ADDRESSES: Final = 4
"""Addresses as which peers see this host that are worth a check: one or two families, one or two routers."""

RELAYS_WANTED: Final = 2
"""Relays at which a host that cannot be dialled holds places: one may fail (go-libp2p: 2)."""

RELAY_LOOK_SECONDS: Final = 5.0
"""How often a host that lacks a relay looks for one among its peers, and the shortest time between renewals."""

RELAY_RETRY_SECONDS: Final = 60.0
"""How long a relay that refused or left is left alone."""

RELAY_ANSWER_SECONDS: Final = 15.0
"""Longest wait for a relay's answer, or for that of the peer behind it."""

RELAY_RENEWAL_SECONDS: Final = 300.0
"""A place at a relay is renewed this long before it expires; of a short one at half time."""

MAX_RELAY_ADDRESSES: Final = 8
"""Addresses of one relay that are told to others."""

RELAY_RESERVATION_SECONDS: Final = 3600
"""How long a place at this host is good for (go-libp2p: one hour)."""

RELAY_RESERVATIONS: Final = 128
"""Peers that have a place at this host at one time (stock daemon: 128)."""

RELAY_RESERVATIONS_PER_ADDRESS: Final = 8
"""Of these, peers at one public address (go-libp2p: 8): one machine can have any number of identities."""

RELAY_CIRCUITS: Final = 256
"""Circuits through this host at one time: each takes two windows of memory and a share of the link."""

RELAY_CIRCUITS_PER_PEER: Final = 16
"""Circuits at one time that one peer is an end of (stock daemon: 16)."""

RELAY_CIRCUIT_SECONDS: Final = 1800
"""Longest life of a circuit (stock daemon that is public: 30 minutes)."""

RELAY_CIRCUIT_BYTES: Final = 4096 * MIB
"""Bytes in each direction of a circuit (stock daemon that is public: 2^32): hidden states go through it."""

REMEMBERED_CHECKS: Final = 16
"""Checks of this host's reachability that count, the latest."""

CHECK_LIFETIME_SECONDS: Final = 1800.0
"""How long a check counts beside later ones: routers get other addresses and rules."""

HOLE_PUNCH_ATTEMPTS: Final = 3
"""Tries to dial a peer at the same time as it dials us; after that the connection stays relayed (go-libp2p: 3)."""

HOLE_PUNCH_TURN_SECONDS: Final = 1.5
"""How long a punched connection waits to be spoken to before it speaks: a round trip and a lost packet."""

HOLE_PUNCH_SECONDS: Final = 5.0
"""Longest time of one such try: a dial that succeeds takes a few round trips."""

HOLE_PUNCH_PERIOD_SECONDS: Final = 60.0
"""Such tries are counted over this long, as AutoNAT's dials are."""

HOLE_PUNCHES: Final = 120
"""Tries in a period, for all peers together: two of a peer that can be reached, for 60 new callers a minute. Each dials
up to four addresses that a stranger chooses."""

HOLE_PUNCHES_PER_PEER: Final = 8
"""The same of one peer: all tries for one connection, twice."""

# --- hivemind dht ---------------------------------------------------------------------------------------

DHT_BUCKET_SIZE: Final = 20
"""Nodes in one bucket of the routing table, and neighbours in one answer (stock: 20)."""

DHT_DEPTH_MODULO: Final = 5
"""A full bucket is split unless its depth is a multiple of this (Kademlia's b; stock: 5)."""

DHT_HAND_OVER_SECONDS: Final = 600.0
"""A peer that appears as a new node is handed records at most this often."""

DHT_REPLICAS: Final = 5
"""Nodes that are asked to keep each record (stock: 5)."""

DHT_CALL_SECONDS: Final = 3.0
"""Longest wait for one answer. Stock peers give up on us after the same time."""

DHT_CALL_BACK_SECONDS: Final = 2.0
"""Longest wait for a caller to answer our call-back: less than the 3 s after which the caller gives up."""

DHT_CALL_BACKS: Final = 64
"""Callers that are called back at the same time; more are told that they cannot be reached."""

DHT_CLOCK_SKEW_SECONDS: Final = 3.0
"""Largest difference between two nodes' clocks; beyond it stock peers refuse each other."""

DHT_PARALLEL_CALLS: Final = 64
"""Calls that one node has in flight."""

DHT_SEARCH_WORKERS: Final = 8
"""Peers asked at the same time by one search (stock: 4, Petals clients 32)."""

DHT_KEYS_PER_QUERY: Final = 16
"""Keys in one question: what stock sends. A stock peer that must answer more than 4 MiB never answers."""

DHT_PEERS_PER_SEARCH: Final = 160
"""Peers asked for one key before the search ends with what it has: a peer may invent neighbours without end."""

DHT_PATIENCE_SECONDS: Final = 0.25
"""An answer is late after this, or DHT_PATIENCE_FACTOR times the median of its search if that is longer. A search with
DHT_REPLICAS answers does not wait for late ones. A first call, with its handshakes, takes 4 round trips."""

DHT_PATIENCE_FACTOR: Final = 3.0
"""See DHT_PATIENCE_SECONDS."""

DHT_FALSE_NEIGHBOURS: Final = 2
"""A node is believed no more once this many of those it named fail, and fewer than a quarter answer. Before the first
answers, as many are asked at a time."""

DHT_SLOW_NEIGHBOURS: Final = 4
"""The same, when those that were asked first take half of the patience: of four nodes, all died within an hour once in
600 times if a fifth of all did, and this many silent ones may be invented."""

DHT_BACKOFF_SECONDS: Final = 5.0
"""A peer that fails to answer a search is left alone this long, then twice as long, and so on (stock: 5)."""

DHT_BACKOFF_LIMIT_SECONDS: Final = 3600.0
"""Where the doubling ends."""

DHT_BACKOFF_PEERS: Final = 4096
"""Failing peers remembered."""

DHT_REMEMBERED_NEIGHBOURS: Final = 16384
"""Neighbours named in answers that are kept read, the latest of the process: some 500 bytes each."""

DHT_RETENTION_SECONDS: Final = 24 * 3600.0
"""Records are dropped after this long even if they claim to live longer. Stock records live 1 to 5 minutes."""

DHT_MAX_RECORD_BYTES: Final = 1 * MIB
"""Largest value, and largest sum of a key's dictionary entries. Several must fit an answer of MAX_UNARY_BYTES."""

DHT_MAX_SUBKEY_BYTES: Final = 4 * KIB
"""Largest packed subkey. Stock's longest hold an OpenSSH public key: 388 bytes for RSA-2048."""

DHT_MAX_SUBKEY_DEPTH: Final = 8
"""Deepest nesting of a subkey: deep ones would make the whole dictionary unreadable. Stock uses text and bytes."""

DHT_MAX_SUBKEY_ITEMS: Final = 8
"""Items in a subkey that is a tuple."""

DHT_MAX_RECORD_ENTRIES: Final = 4096
"""Subkeys under one key. With 8 items in each, the dictionary stays below MAX_MSGPACK_ITEMS."""

DHT_MAX_FIND_KEYS: Final = 256
"""Keys in one question that are answered. Stock sends at most the square root of what it looks for."""

DHT_MAX_STORE_ITEMS: Final = 16384
"""Items in one store request. Stock hands all its records to a new neighbour in one message of at most 4 MiB."""

DHT_STORAGE_BYTES: Final = 128 * MIB
"""Records kept for the network, their bookkeeping included. Beyond it the sender of most makes room."""

DHT_STORAGE_ENTRIES: Final = 128 * 1024
"""Values and subkeys kept, and the same for the cache. A swarm of 1,000 servers of 80 blocks has 80,000."""

DHT_SENDER_SHARE: Final = 8
"""One peer's records take at most one part in this many of storage or cache: 16 MiB and 4 MiB by default."""

DHT_CACHE_BYTES: Final = 32 * MIB
"""Records cached; beyond it those that expire first make room."""

DHT_MAX_RSA_BITS: Final = 4096
"""Largest RSA key whose signatures are checked (stock makes 2048): a check takes longer with the square of it."""

DHT_AUTH_SKEW_SECONDS: Final = 60.0
"""In a private swarm, how old a signed request may be (stock: 60). Its nonce is remembered three times as long."""

DHT_AUTH_NONCES: Final = 256 * 1024
"""Nonces remembered; with more than 1,400 requests a second further ones are refused, not let in unchecked."""

DHT_CACHE_REFRESH_SECONDS: Final = 5.0
"""A cached record that was read is fetched again this long before it expires (stock: 5)."""

DHT_REFRESH_KEYS: Final = 4096
"""Cached records that wait for that; further ones expire and are fetched when they are asked for."""

DHT_BUCKET_REFRESH_SECONDS: Final = 900.0
"""A bucket silent this long is searched for a random id. Kademlia says 3600; volunteers come and go faster."""

DHT_BUCKET_REFRESH_NODES: Final = 80
"""Nodes that all buckets searched at a time may have asked between them, DHT_REPLICAS to DHT_BUCKET_SIZE each: in large
networks, with many buckets, a search for each of 20 nodes is most of the traffic of a node without work."""

DHT_STORE_REQUEST_BYTES: Final = 1 * MIB
"""Records sent in one store request, unless a single one is larger."""

# --- engine ---------------------------------------------------------------------------------------------

CACHE_TOKENS: Final = 16384
"""Tokens of KV cache per served block where no budget in bytes is given (stock, grouped-query models: 16384)."""

MAX_LENGTH: Final = 8192
"""Longest session in tokens (stock servers of grouped-query models: 8192)."""

MAX_BATCH_TOKENS: Final = 8192
"""Batch times tokens of one forward or backward request (stock servers of grouped-query models: 8192)."""

DOWNLOAD_CHUNK_BYTES: Final = 1 * MIB
"""What is read at a time of a download, of a file whose digest is computed, and of a header of unknown size."""

DOWNLOAD_PART_BYTES: Final = 64 * MIB
"""After so many bytes of a download the record says that they are there: what a crash may cost."""

DOWNLOAD_GAP_BYTES: Final = 256 * KIB
"""Bytes between two needed tensors that are fetched with them: another request takes as long."""

DOWNLOAD_SILENCE_SECONDS: Final = 30.0
"""A server of files that sends nothing for this long is asked again."""

DOWNLOAD_TRIES: Final = 8
"""Tries without a byte between them after which a download is given up: about two minutes."""

DOWNLOAD_MAX_PAUSE_SECONDS: Final = 30.0
"""Longest pause between two of them; it begins with one second and doubles."""

DOWNLOAD_TELL_SECONDS: Final = 0.2
"""Between two words of how far a download is."""

LOADING_LOG_SECONDS: Final = 5.0
"""Between two lines of the log about that."""

DISK_RESERVE_BYTES: Final = 512 * MIB
"""What a download leaves free on the disk."""

MAX_WEIGHT_FILE_BYTES: Final = 1024 * GIB
"""Largest file of weights that a hub is believed to have; published ones have up to 50 GiB."""

MAX_TENSOR_HEADER_BYTES: Final = 100 * MIB
"""Longest header of a safetensors file, as its own library has it. One of 1,000 tensors has 100 KiB."""

PARALLEL_SECONDS: Final = 120.0
"""How long one of the processes that share a model waits for the others within one piece of work, or while they start:
importing transformers takes a slow machine half a minute."""

PARALLEL_END_SECONDS: Final = 5.0
"""How long they may take to end."""

MERGED_STEP_TOKENS: Final = 64
"""Batch times tokens that all steps of one ragged batch may have together; a longer step is cut into pieces. On two
cores a block takes some four times as long for 64 tokens as for one."""

MAX_TREE_TOKENS: Final = MERGED_STEP_TOKENS
"""Candidates of one tree step: it always runs within one batch of steps, and its mask is small."""

ONE_THREAD_PRODUCTS: Final = 1 << 23
"""Work on a block up to which one thread computes alone: weights times tokens, and reading a weight counts as
``READ_PRODUCTS``. It is half a millisecond, which a second thread shortens by less than it takes to wake it for each of
a block's operations where the machine is busy: measured with a client of 64 sessions beside the node, on two cores."""

READ_PRODUCTS: Final = 8
"""What reading a weight costs at least, in products with it: 20 to 27 where 4 MB and more come from memory, less from
a cache."""

PIECE_TOKENS: Final = 512
"""Batch times tokens that one block processes at once: bounds activation memory and how long others wait. On CPUs 256
take a tenth longer for each token, 1024 are no quicker."""

SHARED_PIECE_TOKENS_PER_BLOCK: Final = 32
"""The same for each block of the span while sessions step beside a long prompt: a piece is one block's work, and takes
about as long as one token of them in all blocks."""

MIN_SHARED_PIECE_TOKENS: Final = 32
"""Where that stops shrinking on short spans."""

BACKWARD_GRAPH_BYTES: Final = 256 * MIB
"""What a piece of a backward pass may keep of its forward pass so that blocks need not run twice."""

ATTENTION_SCORE_BYTES: Final = 64 * MIB
"""Float32 scores of one piece of attention where the engine or a family's own code holds them all at once: with softcap
or sinks, and in families that attend by themselves. Longer attention goes in several pieces."""

WINDOWED_QUERIES: Final = 256
"""Queries that attend together over a sliding window: the cost grows with the window, not with the sequence."""

GROUPED_SEQUENCES: Final = 4
"""Sequences of one new token from which on their attention is computed in one call."""

GROUPED_BYTES: Final = 1 << 17
"""Keys and values of such a sequence in one block at most: they are copied next to those of the others, which takes
less time than a call of its own. (Two cores of a Zen 3, sixteen sequences: of so many bytes 0.4 of the time, of four
times as many about the same.)"""

GROUPED_TOKENS: Final = 256
"""The same for small heads, where each token is copied by itself."""

SCHEDULER_PATIENCE_SECONDS: Final = 0.5
"""After so long in the queue a piece of a forward or backward pass runs although sessions step, and a request although
its peer had more than its share. Two pieces a second leave most of the time to sessions."""

GATHER_SHARE: Final = 0.5
"""How long steps wait for others after a batch, as a share of what that took. A batch of twice as many takes less than
two of them: while steps come in time, nothing is lost by waiting for so long, and while they do not, a third."""

GATHER_MAX_PAUSE: Final = 64
"""Batches without such waiting at most, after it was in vain several times in a row: it loses below 1 % then."""

PAGE_TOKENS: Final = 16
"""Tokens of one page of the KV cache: half of it is what a sequence wastes on average."""

CACHE_PROMISE_TOKENS: Final = 128
"""What a session is promised of the KV cache when it opens, up to its maximum length. Most sessions end long before the
length that their clients ask for."""

CACHE_AHEAD_TOKENS: Final = 64
"""What it is promised beyond what it uses, as soon as it needs more than was promised."""

PREFIX_SHARE: Final = 0.25
"""How much beginnings of prompts that are kept may take, pages with their outputs, as a share of the KV cache's bytes:
outputs lie beside it, in the host's memory, and kept pages break the runs in which sessions grow."""

OFFLOAD_MIB: Final = 4096
"""Memory of the host for the KV cache of idle sessions, where they may leave the device at all."""

CACHE_GROWTH_SECONDS: Final = 20.0
"""How long a step waits for room in the KV cache that its session was not promised yet, while others may end. Well
below the 180 s after which stock clients give up on an answer."""

# --- experts --------------------------------------------------------------------------------------------

STEP_TIMEOUT_SECONDS: Final = 300.0
"""A session in which the client sends nothing for this long is ended (stock: 300 s)."""

SESSION_TIMEOUT_SECONDS: Final = 1800.0
"""Longest life of one inference session (stock: 1800 s)."""

REQUEST_TIMEOUT_SECONDS: Final = 180.0
"""Longest time for one forward or backward request, queueing included (stock: 180 s)."""

MAX_ALLOC_TIMEOUT_SECONDS: Final = 600.0
"""Longest wait for KV cache that a client may ask for (stock: 600 s)."""

MAX_SESSIONS_PER_PEER: Final = 256
"""Open inference sessions of one peer. The KV cache bounds memory; this bounds tasks and streams."""

MAX_TRAINING_REQUESTS: Final = 32
"""Forward and backward requests decoded at one time; further ones wait with their bytes still encoded."""

MAX_TRAINING_REQUESTS_PER_PEER: Final = 8
"""One peer's share of those; stock clients send the parts of a large batch at the same time."""

REMEMBERED_STEPS: Final = 256
"""Step ids a session remembers, to drop the second of a pushed and a sent copy."""

PUSH_TIMEOUT_SECONDS: Final = 30.0
"""A push that takes longer is useless: the client's own message has long arrived."""

MAX_PUSHES_UNDER_WAY: Final = 64
"""Outgoing pushes at one time; further ones are left out, since the client sends the step anyway."""

UNKNOWN_PUSHES_PER_MINUTE: Final = 60
"""Pushes to sessions that do not exist which one peer may make; late pushes of ended sessions are normal."""

INLINE_BYTES: Final = 256 * KIB
"""Plain tensors up to this size are coded on the event loop (0.1 ms), larger ones in a worker thread."""

INLINE_COMPRESSED_BYTES: Final = 16 * KIB
"""The same for compressed tensors: one token of hidden size 4096 takes 0.05 to 2 ms, by codec."""

ANNOUNCE_PERIOD_SECONDS: Final = 120.0
"""How often block records are renewed (stock servers: 120 s, living for 240 s)."""

ANNOUNCE_LIFETIME_PERIODS: Final = 3
"""A record lives for this many periods, so that one failed round does not unlist the node."""

KWAAI_RECORD_SECONDS: Final = 360.0
"""How long a record lives in a KwaaiNet swarm (its own nodes: 360 s, renewed every 120 s)."""

REACHABILITY_CHECK_SECONDS: Final = 5.0
"""Limit of one dial-back that a peer asked for (stock: 5 s)."""

REACHABILITY_CHECKS_AT_ONCE: Final = 4
"""Dial-backs at one time, so that the service cannot be used to make this node flood others."""

# --- kwaai ----------------------------------------------------------------------------------------------

KWAAI_SESSION_TOKENS: Final = 2048
"""How long sessions are taken to become where places are counted for leases: a request says nothing of it. They take
room in the KV cache as they need it."""

KWAAI_SESSION_IDLE_SECONDS: Final = 600.0
"""A session without a request for this long is closed (KwaaiNet: 600 s). There is no message that closes one."""

KWAAI_LEFT_SESSION_SECONDS: Final = 30.0
"""A session that has been idle this long makes room for another one of the same peer, and where its peer is not
connected any more, of anybody's."""

KWAAI_ROOM_SECONDS: Final = 2.0
"""How often a server looks whether the KV cache, which other protocols' sessions share, has room."""

KWAAI_ROOM_SHARE: Final = 0.25
"""With less of the cache free than this, sessions end that peers left which are not connected any more."""

KWAAI_DRAIN_IDLE_SECONDS: Final = 15.0
"""A server that stops takes a session for finished after this long without a request. Tokens of slow chains take
a second or two each."""

KWAAI_SESSIONS_PER_PEER: Final = 64
"""Open sessions of one peer, whatever room there is. Gateways hold one for each of their users."""

KWAAI_EMBEDDINGS_SECONDS: Final = 5.0
"""How long a request waits for embeddings or head to be read at their first use; then it is told that the node warms
up, and the reading goes on."""

KWAAI_LEASE_SECONDS: Final = 30
"""How long a lease lasts after the last request of its peer, whole seconds (KwaaiNet: 30)."""

KWAAI_LEASES_PER_PEER: Final = 16
"""Leases of one peer at a time. Over the unary protocol it has one."""

KWAAI_RETRY_SECONDS: Final = 5
"""When a denied peer should ask again, whole seconds, if no lease ends earlier (KwaaiNet: 5)."""

KWAAI_MUX_STREAMS: Final = 64
"""Mux streams at one time."""

KWAAI_MUX_STREAMS_PER_PEER: Final = 4
"""Those of one peer. It needs one."""

KWAAI_MUX_REQUESTS: Final = 32
"""HTTP requests that run at the local endpoint at one time; further ones are answered with 503."""

KWAAI_MUX_REQUESTS_PER_PEER: Final = 16
"""Those of one peer; further ones are answered with 429."""

KWAAI_MUX_BODY_BYTES: Final = 4 * MIB
"""Longest body of a tunnelled HTTP request: a chat of a million characters. Longer ones are answered with 413."""

KWAAI_MUX_ANSWER_BYTES: Final = 16 * MIB
"""Longest body of an answer of the local endpoint that is passed on; embeddings of a thousand texts."""

KWAAI_MUX_PEER_BYTES: Final = 64 * MIB
"""Bytes of one peer's mux requests and unread answers in memory: its sixteen longest requests."""

KWAAI_MUX_BYTES: Final = 256 * MIB
"""The same for all peers together. A peer that would exceed either is answered with 503 or cut off."""

KWAAI_MUX_SECONDS: Final = 300.0
"""Longest time for one tunnelled request: 3,000 tokens at 10 tokens per second."""

KWAAI_MUX_IDLE_SECONDS: Final = 600.0
"""A mux stream on which nothing was sent or answered for this long is closed."""

KWAAI_TENSOR_STREAMS: Final = 16
"""Tensors that are received at one time."""

KWAAI_TENSOR_STREAMS_PER_PEER: Final = 2
"""Those of one peer."""

KWAAI_TENSOR_PEER_BYTES: Final = 2 * MAX_TENSOR_FRAME_BYTES
"""Bytes of one peer's tensors in memory until they were taken."""

KWAAI_TENSOR_BYTES: Final = 4 * MAX_TENSOR_FRAME_BYTES
"""The same for all peers together."""

KWAAI_TENSOR_SECONDS: Final = 120.0
"""A tensor must have arrived by then: 64 MiB at 4.5 Mbit/s."""

KWAAI_TENSOR2_STREAMS: Final = 64
"""Streams of /kwaai/tensor/2.0.0 at one time. Each may hold a frame and its offers: 3 MiB at most."""

KWAAI_TENSOR2_STREAMS_PER_PEER: Final = 4
"""Those of one peer. It needs one, and another for what must not wait behind a large tensor."""

KWAAI_TENSOR2_OFFERS: Final = 16
"""Offers of one stream that are not done with. The number is part of the protocol."""

KWAAI_TENSOR2_IN_FLIGHT: Final = 4
"""Tensors that a sender has encoded and offered on one stream: the next one's answer comes while one is sent."""

KWAAI_TENSOR2_PART_BYTES: Final = 512 * KIB
"""Values in the parts that are sent: two of a stream's first windows, and headers do not count."""

KWAAI_TENSOR2_BYTES: Final = 1024 * MIB
"""Memory for tensors that were accepted and not yet taken, encoded and decoded, of all peers."""

KWAAI_TENSOR2_PEER_BYTES: Final = 512 * MIB
"""That of one peer, so the largest tensor that is accepted: 134 million values in float32 as they are."""

KWAAI_TENSOR2_SECONDS: Final = 60.0
"""Time for a tensor from its turn on, beside that of its bytes."""

KWAAI_TENSOR2_BYTES_PER_SECOND: Final = 128 * KIB
"""How fast a tensor must come on the whole (1 Mbit/s): slower ones hold memory that others wait for."""

KWAAI_TENSOR2_IDLE_SECONDS: Final = 120.0
"""A stream on which no tensor is under way is ended after this long without an offer."""

# --- node -----------------------------------------------------------------------------------------------

MIN_CACHE_TOKENS: Final = 64
"""Smallest KV cache that is accepted: measuring the throughput at the start needs a session of 17 tokens."""

BOOTSTRAP_ROUND_SECONDS: Final = 15.0
"""How long a start waits for its bootstrap peers to be tried; after that it goes on without."""

DHT_JOIN_RETRY_SECONDS: Final = 30.0
"""Wait before joining again through a peer that is connected but whose DHT did not accept us."""

DRAIN_SECONDS: Final = 60.0
"""How long running sessions may go on after SIGTERM. Service managers kill after 90 s by default."""

REBALANCE_SECONDS: Final = 60.0
"""Mean time between two looks of a node that chose its blocks at whether others need it more (stock: 60 s)."""

REBALANCE_MAX_SECONDS: Final = 3600.0
"""The same after moves that failed: each doubles it up to this, since a model may be tens of gigabytes."""

MOVE_SPARE_BYTES: Final = 512 * MIB
"""Memory that must be left beside a second span of blocks before it is loaded while the first is served."""

MODEL_RETRY_SECONDS: Final = 30.0
"""After a model of several could not be loaded, until it is tried again."""

MODEL_RETRY_MAX_SECONDS: Final = 1800.0
"""The same after more attempts: each doubles it up to this. An attempt reads files and perhaps a network."""

OFFLINE_STORE_SECONDS: Final = 10.0
"""How long a leaving node tries to withdraw its records before it goes without."""

LISTEN_ADDRESSES: Final = ("/ip4/0.0.0.0/tcp/31330", "/ip6/::/tcp/31330")
"""Where a node listens unless told otherwise. 31330 is the port that Petals' documentation uses."""

NETWORK_MBPS: Final = 100.0
"""Assumed speed of the link, megabits per second, unless YAML states it (stock: the same)."""

REACHABILITY_PEERS: Final = 5
"""Peers that are asked to dial this node in one round (stock: 5)."""

REACHABILITY_RETRY_SECONDS: Final = 5.0
"""Wait before the next round while the verdict is open or in doubt, or was just lost."""

REACHABILITY_PERIOD_SECONDS: Final = 600.0
"""Wait between rounds while the node can be dialled."""

PRIVATE_PERIOD_SECONDS: Final = 120.0
"""The same while it cannot: the operator may be opening a port just now."""

REACHABILITY_START_SECONDS: Final = 25.0
"""How long a start waits for a first verdict before blocks are announced: a dial that fails takes 15 s."""

RPC_CHECK_SECONDS: Final = 10.0
"""Longest wait for Petals' reachability check at a peer (stock: 10 s)."""

LAG_PERIOD_SECONDS: Final = 0.5
"""How often the event loop's lag is measured: often enough for a tail within minutes, 20 us of CPU each."""

LAG_BOUNDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Bounds in seconds between which lags are counted: an idle loop is below the first, and peers notice from a tenth of a
second on."""

STEP_SECONDS_BOUNDS: Final = tuple(0.00025 * 2.0**n for n in range(18))
"""Bounds in seconds between which the parts of a step are counted: 0.25 ms, as reading one takes, to half a minute."""

BATCH_TOKENS_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64)
"""Bounds between which batches of steps are counted by their tokens, of which they have MERGED_STEP_TOKENS at most."""

ENGINE_CHECK_SECONDS: Final = 10.0
"""Pause between two checks whether the engine gives a turn."""

ENGINE_PATIENCE_SECONDS: Final = 30.0
"""Longest wait for a turn: many times the longest piece of work of a large model on a slow machine."""

OPENAI_REQUESTS: Final = 8
"""Requests to the OpenAI endpoint that are answered at one time: each holds a session at every server of a chain."""

OPENAI_REQUESTS_PER_MINUTE: Final = 60
"""Most that begin in a minute where others than this machine can ask."""

OPENAI_BODY_BYTES: Final = 1 * MIB
"""Longest request: a conversation of some 200,000 tokens."""

COMPLETION_TOKENS: Final = 16
"""Length of a completion without max_tokens, as in OpenAI's reference."""

CHAT_TOKENS: Final = 512
"""The same of a turn of a conversation, which OpenAI's reference does not bound: a page of text."""

WEB_CONNECTIONS: Final = 32
"""HTTP connections to each side at one time; a scraper and a few people need one each. Further ones are closed."""

WEB_IDLE_SECONDS: Final = 15
"""An HTTP connection without a request is closed after that; scrapers ask every 5 to 60 s."""

WEB_SEND_SECONDS: Final = 10.0
"""How long an HTTP client may take to read what the system's buffers do not hold of an answer."""

WEB_LINGER_SECONDS: Final = 0.25
"""How long an HTTP client that has closed its end may still be answered. Hypercorn would keep its place for
WEB_IDLE_SECONDS."""

WEB_TOKEN_CHARACTERS: Final = 16
"""Shortest token that is accepted: about as many bits as nobody guesses over a network."""

EVENTS_KEPT: Final = 100
"""Events of a node that the dashboard shows: some hours of a quiet node, 50 KiB at most."""

DASHBOARD_PERIOD_SECONDS: Final = 1.0
"""How often a page is told the status. It takes a millisecond or less to make."""

DASHBOARD_PAGES: Final = 8
"""Pages that are told at one time: a few people, and their connections leave most of WEB_CONNECTIONS to others."""

DASHBOARD_PEERS: Final = 200
"""Connected peers that a page lists; a busy node has thousands."""

DASHBOARD_SERVERS: Final = 100
"""Servers of a model that a page lists; its coverage counts all."""

DASHBOARD_MODELS: Final = 8
"""Models of a network whose coverage a page shows; anybody may register as many as he likes."""

DASHBOARD_CELLS: Final = 96
"""Parts in which a page draws a model's blocks; a phone shows that many still."""

SURVEY_PERIOD_SECONDS: Final = 60.0
"""How often the DHT is read while a page is open: some hundred keys for each model, kept by other peers."""

STATUS_SECONDS: Final = 5.0
"""How long `kwaainet-bridge status` waits for the node; a healthy one answers in milliseconds."""

STATUS_WATCH_SECONDS: Final = 2.0
"""Pause between two looks with `--watch`."""

VIEW_ROWS: Final = 500
"""Rows that `peers`, `sessions` and `blocks` show: more than anybody reads, some 200 KiB. Others are counted."""

REFUSED_KEPT: Final = 64
"""Peers or addresses that were turned away, of which a node knows why and how often."""

LOG_RING_BYTES: Final = 2 * MIB
"""Records of the log that a node keeps for `kwaainet-bridge logs`: some 6000, hours of a quiet node."""

LOG_RECORD_BYTES: Final = 16 * KIB
"""Longest record that is kept whole. Tracebacks take some KiB; their beginning and end are kept."""

LOG_ANSWER_RECORDS: Final = 2000
"""Records that one answer holds at most: about half a MiB."""

LOG_RECORDS: Final = 200
"""Records that are shown unless somebody asks for more."""

LOG_FOLLOWERS: Final = 8
"""Readers that are told of new records at one time, as of pages."""

LOG_FOLLOW_SECONDS: Final = 0.25
"""How often they are told: at once, as people see it."""

LOG_SILENCE_SECONDS: Final = 5.0
"""A reader is sent an empty line after so long without a record, so that it can tell quiet from gone."""

IDLE_PERIOD_SECONDS: Final = 5.0
"""How often it is looked at what others use of this machine: the driver keeps samples of some seconds, and a look takes
milliseconds."""

IDLE_PAUSE_PERCENT: Final = 20.0
"""What others use, in percent, above which they count as using a machine: a desktop and a film on it stay below."""

IDLE_PAUSE_SECONDS: Final = 10.0
"""For how long. A program that starts may be busy for some seconds."""

IDLE_RESUME_PERCENT: Final = 10.0
"""What others use below which they count as having left."""

IDLE_RESUME_SECONDS: Final = 120.0
"""For how long. A node that comes back too early disturbs a game between two
rounds; later, it only serves a bit less."""

CONTROL_PERIOD_SECONDS: Final = 0.5
"""How often `drain --wait` looks whether the node is still there."""

RELOAD_SECONDS: Final = 30.0
"""How long a reload may take: libraries may have to be imported for what it turns on."""

SUPERVISOR_PATIENCE_SECONDS: Final = 60.0
"""How long a service manager is asked to wait at a time, three times as often, while a node starts or drains."""

# --- client ---------------------------------------------------------------------------------------------

DIRECTORY_SECONDS: Final = 60.0
"""Block records older than this are read again before a route is chosen (stock clients: 60 s)."""

DOUBTFUL_DIRECTORY_SECONDS: Final = 5.0
"""The same for a route over a server that did not answer lately: others may have come meanwhile."""

DIRECTORY_READ_SECONDS: Final = 60.0
"""Longest time to read the records of all blocks of a model from the DHT."""

UNMEASURED_THROUGHPUT: Final = 1e-6
"""Requests a second that a server counts for which joins and announces none yet, where a new node chooses its blocks:
less than any real one's, so that it hides no block without any server."""

BALANCE_QUALITY: Final = 0.75
"""A node that chose its blocks moves if their weakest has less than this share of the throughput that it could have
(stock: 0.75)."""

BALANCE_EPSILON: Final = 1e-3
"""What counts as no difference when that is judged, in requests a second and as a share (stock: the same)."""

REBALANCE_SIMULATED_MOVES: Final = 50_000
"""Most moves of other servers that are thought through for one judgement: about a second of one core, and fifty rounds
of a thousand servers. Whoever announces blocks decides how much there is to think about."""

REBALANCE_SERVERS_ON_LOOP: Final = 16
"""Up to this many servers that is done in the event loop, which takes a millisecond or two; else in a thread."""

MAX_THROUGHPUT: Final = 1e9
"""Requests a second that one server counts for at most where blocks are chosen: more than any has. Sums of greater
numbers would lose the digits of all others, or be infinite."""

MAX_PINGED_SERVERS: Final = 16
"""Servers whose round-trip time is measured per reading of the records, chosen at random."""

PING_SECONDS: Final = 2.0
"""Longest wait for those round trips; who does not answer counts as far away (stock: 2 s)."""

MAX_MODEL_BLOCKS: Final = 1024
"""Blocks of a model in the swarm's registry: each is looked up. The deepest models in use have about 130."""

MAX_SURVEYED_MODELS: Final = 64
"""Models of a registry that are looked up at one go; anybody may register as many as he likes."""

SURVEYED_AT_ONCE: Final = 4
"""Models whose records are read at one time: the DHT node makes DHT_PARALLEL_CALLS calls in all anyway."""

SERVER_CHECKS_AT_ONCE: Final = 32
"""Servers that are dialled at one time to see who can be reached."""

SERVER_CHECK_SECONDS: Final = 8.0
"""Limit of one such check: finding the addresses, a dial with its handshakes, two pings."""

SERVER_CHECKS_SECONDS: Final = 60.0
"""Limit of all such checks together; who has not had his turn counts as not checked."""

WALK_MAX_PEERS: Final = 1000
"""Peers that a walk through the DHT asks, so that invented ones cannot keep it going."""

WALK_PARALLEL_PEERS: Final = 32
"""Peers that it asks at one time. Those that are gone take DHT_CALL_SECONDS each."""

WALK_SECONDS: Final = 90.0
"""Limit of a whole walk."""

STORE_TTL_SECONDS: Final = 300.0
"""How long a record lives that was stored by hand without a word about it."""

UNKNOWN_RTT_SECONDS: Final = 0.15
"""Round trip assumed for a server that was not measured (stock: 0.15 s)."""

WORST_RTT_SECONDS: Final = 5.0
"""Round trip assumed for a server that did not answer a ping: it is used only if nobody else can (stock: 5 s)."""

HOP_OVERHEAD_SECONDS: Final = 0.018
"""Serialising and queueing at each server of a chain, beside the round trip (stock: 0.018 s)."""

UNKNOWN_INFERENCE_RPS: Final = 300.0
"""One-token steps per second and block, assumed for a server that does not say (stock: 300)."""

NO_CACHE_PENALTY_SECONDS: Final = 10.0
"""Added to the cost of a server whose record leaves no room for the session's keys and values (stock: 10 s)."""

BAN_SECONDS: Final = 15.0
"""How long a server that failed is avoided; doubles with each further failure (stock: 15 s)."""

MAX_BAN_SECONDS: Final = 900.0
"""Longest ban, so that a server that was repaired is found again."""

RETRY_MIN_SECONDS: Final = 1.0
"""Pause before the second retry; the first is immediate, later pauses double (stock: 1 s)."""

RETRY_MAX_SECONDS: Final = 60.0
"""Longest pause between two retries (stock: 60 s)."""

MAX_ATTEMPTS: Final = 8
"""Rounds of tries of one range of blocks before a step or request fails: about a minute, pauses included. In a round
each server is tried once, and no more of them than this. Stock clients retry for ever."""

CONNECT_SECONDS: Final = 10.0
"""Longest time to reach a server and open a stream. Stock allows 5 s, too short for a busy relay."""

INFO_SECONDS: Final = 10.0
"""Longest wait for a server's description of itself."""

CLIENT_STEP_SECONDS: Final = 180.0
"""Longest wait for the answer of one step, forward or backward request (stock: 180 s)."""

CLIENT_UNARY_BYTES: Final = MIB
"""Requests and answers with more tensor bytes than this use the streaming calls (stock: 1 MiB)."""

PREFILL_TOKENS: Final = 1024
"""Tokens, times batch, of one step while a prompt is read or a history replayed: small enough for any server's
``max_batch_size`` and for other sessions to get their turn in between."""

# --- averaging ------------------------------------------------------------------------------------------

AVERAGING_PART_BYTES: Final = 512 * KIB
"""Bytes of one part of a tensor as it travels. Not negotiated: all members of a group must have the same (stock:
2^19)."""

AVERAGING_INLINE_BYTES: Final = MIB
"""Tensors up to this size are weighed, added, and coded plainly or as float16 on the event loop: a part takes 0.02 to
0.15 ms, and a way to another thread and back as long."""

AVERAGING_THREADS: Final = 4
"""Threads that code larger ones, and no more than there are cores. The allocator keeps memory for each thread: with one
for every stream of a group they had half of the tensors' size."""

AVERAGING_GROUP_ID_BYTES: Final = 64
"""Longest id of a group. Stock leaders send 20 bytes; PowerSGD appends 7."""

AVERAGING_MAX_GROUP: Final = 256
"""Members of a group, where no target size is set. Stock runs use 2 to 64."""

AVERAGING_INLINE_BALANCE: Final = 16
"""Largest group whose given bandwidths are balanced on the event loop: it takes 5 ms; 64 members take 60 ms."""

AVERAGING_GATHER_BYTES: Final = 64 * KIB
"""What one member may tell its group (``gather``): a leader sends all of them to everybody."""

AVERAGING_JOIN_BYTES: Final = 2 * AVERAGING_GATHER_BYTES
"""Longest request to join a group: what its sender gathers, and its few fields."""

AVERAGING_LEADER_BYTES: Final = AVERAGING_MAX_GROUP * (AVERAGING_GATHER_BYTES + KIB)
"""Longest message of a leader: what a full group gathered, and its ids."""

AVERAGING_MAX_VALUE: Final = 1e36
"""Largest weight times value: the sum of a full group's stays below float32's 3.4e38."""

AVERAGING_MATCHMAKING_SECONDS: Final = 5.0
"""A declared peer waits so long for others before it begins with those who came (stock: 5 s)."""

AVERAGING_REQUEST_SECONDS: Final = 3.0
"""Longest wait for a leader's first answer; shorter than the above, so that two peers that ask each other both
get on in time (stock: 3 s)."""

AVERAGING_FIRST_SEARCH_SECONDS: Final = 0.05
"""Pause between the first two looks for leaders in the DHT; each later one is twice as long. Peers that begin to look
at the same moment do not find each other the first time."""

AVERAGING_SEARCH_SECONDS: Final = 0.5
"""Longest such pause. Stock peers look again at once while they know of none."""

AVERAGING_FIRST_PART_SECONDS: Final = 15.0
"""Longest wait for the first message of a call."""

AVERAGING_PART_SECONDS: Final = 15.0
"""Least time that a member has for a part; for the first one, from when the group begins (stock optimizers: 15 s)."""

AVERAGING_PART_FACTOR: Final = 8.0
"""A member has this many times what the slowest part before took, if that is more, and at most half of
AVERAGING_RESULT_SECONDS: then others still wait for our average."""

AVERAGING_RESULT_FACTOR: Final = 4
"""A member may take this many times the least time for a part to answer with the next average: it waits for senders
meanwhile (stock: twice the time for a part)."""

AVERAGING_RESULT_SECONDS: Final = AVERAGING_RESULT_FACTOR * AVERAGING_PART_SECONDS
"""That is 60 s, unless an averager is given another time for a part."""

AVERAGING_ALLREDUCE_SECONDS: Final = 600.0
"""Limit of a whole all-reduce; what has not come by then keeps its local values (stock: none; optimizers: 60 s)."""

AVERAGING_STATE_SECONDS: Final = 30.0
"""How long a record lives by which a peer offers its state, and the longest wait for the next piece of one (stock:
30 s; none)."""

AVERAGING_STATE_FACTOR: Final = 8
"""A state that is downloaded may have this many times the bytes of the tensors that are averaged, plus 64 MiB:
parameters in float32 with an optimizer's moments are 3 to 6 times those of half precision."""

AVERAGING_HELPED_BYTES: Final = 1024 * MIB
"""Largest tensors of a run that a node helps unless it is configured otherwise; two to three times as much is used."""

AVERAGING_HELP_RETRY_SECONDS: Final = 30.0
"""Pause after which a node looks again for a peer of a run that it helps. Records of who shares a state live as
long."""

AVERAGING_REMEMBERED_BANS: Final = 16
"""So many members that were left out are told in a node's status, the latest ones: a screen of them."""

AVERAGING_SECONDS_BOUNDS: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Bounds in seconds between which all-reduces are counted by how long they took: small groups on a fast network need
some tenths, the limit is AVERAGING_ALLREDUCE_SECONDS."""


# --- training ---------------------------------------------------------------------------------------------

TRAINING_MATCHMAKING_SECONDS: Final = 15.0
"""How long before an epoch's end peers look for their group, and wait for each other (stock: 15 s; 2 to 5 s suffice in
a fast network)."""

TRAINING_AVERAGING_SECONDS: Final = 60.0
"""Limit of one round of averaging, search included; then a peer goes on with its own gradients (stock: 60 s)."""

TRAINING_LOAD_SECONDS: Final = 600.0
"""Limit of one attempt to get the state from others (stock: 600 s)."""

TRAINING_RECORD_SECONDS: Final = 60.0
"""A peer's report lives so long, and is renewed after half of it (stock: 60 s)."""

TRAINING_REPORT_SECONDS: Final = 0.1
"""Least time between two reports: small models take a hundred steps per second (stock: none)."""

TRAINING_LOOK_SECONDS: Final = 3.0
"""Pause between two looks at the run's reports while there are none (stock: 3 s)."""

TRAINING_LOOK_MIN_SECONDS: Final = 0.5
"""Least pause between two looks at the run's reports (stock: 0.5 s)."""

TRAINING_LOOK_MAX_SECONDS: Final = 10.0
"""Longest pause between two looks at the run's reports (stock: 10 s)."""

TRAINING_DRIFT_PEERS: Final = 3
"""So many peers may join within an epoch: looks come before its estimated end accordingly (stock: 3)."""

TRAINING_DRIFT_RATE: Final = 0.2
"""Such a part of the peers may join within an epoch, if that is more (stock: 0.2)."""

TRAINING_RATE_SMOOTHING: Final = 0.1
"""Weight of the newest value in the average of seconds per sample (stock: 0.1)."""

TRAINING_DOUBT_SECONDS: Final = 60.0
"""Reports of an epoch whose state nobody gave are left out so long: as long as a report lives without renewal."""

TRAINING_RETRY_SECONDS: Final = 1.0
"""Pause after an attempt to get the state that failed: peers announce it some round trips after they begin."""

TRAINING_GOODBYE_SECONDS: Final = 3.0
"""Limit of taking back one's report when leaving; it expires anyway (stock: 5 s)."""
