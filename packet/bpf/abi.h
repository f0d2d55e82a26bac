/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * Keys and values of the maps: everything that the program and user space share. `src/lane/kernel/abi.rs` says the same in Rust;
 * sizes and offsets are asserted below, and a test compares both sides by the objects' BTF.
 *
 * Who writes what:
 *   user space only   config, generation, slots, backends, services, filters, leases, routes, neighbours, host, grants; it alone takes
 *                     flows out of names
 *   the program only  traffic, tally, seen, news; `last_seen` of flows
 *   both              pool, names: user space any flow, the program kept ones (FLOW_KEPT), in cells that it was given for them
 *
 * Words that are read while they may be written are 8 bytes long and aligned, so that no reader sees half of one.
 * Addresses are 16 bytes, IPv4 as IPv4-mapped IPv6. Ports are in network order.
 */
#ifndef KOMAINU_ABI_H
#define KOMAINU_ABI_H

#include "helpers.h"

#define PORT_SERVICE 0
#define PORT_INSIDE 1
#define PORTS 2
/* Of an owned address: answered for on every port. */
#define PORT_ANY 2

/* Lease cells: plan.rs MAX_GROUPS. */
#define LEASES 256
/* Slots of one element of a Maglev table: a cache line. */
#define SLOTS_PER_LINE 16
/* Registers of a window of `seen`. */
#define REGISTERS 256
/* Secrets that a hash of a flow's name takes at most. */
#define INDEX_SECRETS 11
/* Length of such a window in ns. */
#define WINDOW 3000000000ULL
/* `last_seen` is written at most so often, to spare the cache line: 2^27 ns, 134 ms. */
#define LAST_SEEN_STEP (1ULL << 27)

#define TALLY_EVENTS 16
#define TALLY_DROPS 48
#define TALLY_UP 32

/* An interface. */
struct port {
    /* Its address in bytes 0..6 in transmission order; 0 while there is no such port. */
    u64 mac;
    u32 ifindex;
    /* tc: the device to which frames go up; 0: none, and what should go up is dropped. */
    u32 up;
    /* Largest layer-3 packet that may leave by it. */
    u32 mtu;
    u32 reserved[3];
};

struct config {
    struct port ports[PORTS];
    /* Entries of `backends`, `seen`; `traffic` has so many for each processor. */
    u32 backends;
    /* Entries of `services`. */
    u32 services;
    /* CONFIG_* */
    u32 flags;
    u32 reserved0;
    /* How old a reading of the clock may be in ns, see clock.h; 0: it is read for every packet. */
    u64 slack;
    /* The plan in force: PLAN_* */
    u64 plan;
    /* Where flows are found: INDEX_* */
    u64 index;
    u64 reserved[3];
    /* What the hashes of flows' names are made with: table.h. */
    u64 secrets[INDEX_SECRETS];
    u64 reserved1[5];
};

/* In `config.plan`: the entry of `generation` that it stands in, how far a hash is shifted to number its cells, what the hash
 * begins with. One word, so that a packet that reads it once sees one plan. */
#define PLAN_ENTRY(word) ((u32)(word) & 1)
#define PLAN_SHIFT(word) ((u32)(word) >> 8 & 63)
#define PLAN_SEED(word) ((u32)((word) >> 32))

/* In `config.index`: the entry of `names` that it stands in, how far a hash is shifted to number its lines. While INDEX_GROWS names may
 * stand in a larger one at the other entry, too; while INDEX_MOVES new ones go there. One word, as above. */
#define INDEX_ENTRY(word) ((u32)(word) & 1)
#define INDEX_GROWS 2
#define INDEX_MOVES 4
#define INDEX_SHIFT(word) ((u32)(word) >> 8 & 31)
#define INDEX_NEXT_SHIFT(word) ((u32)(word) >> 16 & 31)

/* Every flow of `nat` whose answers may come is in the table: an answer that is not found there is dropped here. */
#define CONFIG_BOUND_COMPLETE 1u
/* There are nat-transparent services of that family. */
#define CONFIG_THROUGH_V4 2u
#define CONFIG_THROUGH_V6 4u
/* User space sleeps until it is woken: the next piece of news wakes it. */
#define CONFIG_WAKE 16u

/* What a place of a plan is. */
#define KIND_SERVICE 0 /* VIP, port, protocol */
#define KIND_OWNED 1   /* an address that is answered for */
#define KIND_ANSWER 2  /* address, port, protocol of a nat-transparent backend */
#define KIND_BACKEND 3 /* the address of one */

struct place {
    u8 address[16];
    u16 port;
    u8 protocol;
    u8 kind;
};

#define MODE_DSR 0
#define MODE_NAT 1
#define MODE_NAT_TRANSPARENT 2

/* The backend of a new flow is chosen by hash. */
#define RECORD_HASHED 0x0001
/* By a hash of the client's address alone. */
#define RECORD_SOURCE_IP 0x0002
/* Every flow is remembered. */
#define RECORD_TRACKS_ALL 0x0004
/* The dead-backend policy is `keep`. */
#define RECORD_KEEP 0x0008
/* Everything for this service goes up. */
#define RECORD_UP 0x0010
/* Full NAT whose new flows are made here: make.h. */
#define RECORD_MAKES 0x0020
/* Of an owned address: clients use it, backends route through it, it is a source of full NAT. */
#define RECORD_VIP 0x0100
#define RECORD_INSIDE 0x0200
#define RECORD_SNAT 0x0400

/* What stands at a place. */
struct record {
    u32 group;
    /* Numbers of the engine's states. */
    u32 service;
    u32 backend;
    u16 flags;
    u8 mode;
    /* Port on which an owned address is answered for. */
    u8 port;
    /* Tables in `slots` and their numbers of slots; `base_size` 0: there is no base table. */
    u32 current;
    u32 current_size;
    u32 base;
    u32 base_size;
    /* Of an answer: its service's. */
    u8 vip[16];
    u16 vip_port;
    u16 reserved0;
    /* The service's cluster-wide number. */
    u32 id;
    /* A closing flow that was silent for so long in ns is not opened again here: user space may be about to forget it. */
    u64 reopen;
    /* The first SNAT address of a service with RECORD_MAKES. */
    u8 snat[16];
    /* How many it has; where there are more, all of them are a table in `slots`, a word of them in each slot. */
    u32 snat_count;
    u32 snats;
    u64 reserved;
};
/* Words, and slots, that a SNAT address takes. */
#define SNAT_WORDS 4

/* A cell of the plan's table: a place is found at the cell that its hash names or, where others stand there, behind them without a
 * gap, PLACE_PROBES cells away at most. */
struct place_entry {
    struct place place;
    u32 used;
    u64 reserved0;
    struct record record;
};
#define PLACE_PROBES 16

/* A slot: number of the backend's state + 1, 0 for nobody, and flags. */
#define SLOT_NUMBER 0x00ffffff
/* New flows may go to it. */
#define SLOT_ALIVE 0x40000000
/* Of the current table: the base table may say another backend for the hashes of this slot. */
#define SLOT_MOVED 0x80000000

struct slot_line {
    u32 slots[SLOTS_PER_LINE];
};

/* The way to an address: MAC in bytes 0..6, port in byte 6, flags in byte 7. */
#define HOP_MAC 0x0000ffffffffffffULL
#define HOP_PORT(hop) ((u32)((hop) >> 48) & 0xff)
/* The MAC is known. */
#define HOP_KNOWN (1ULL << 56)
/* The address itself is on the link; of a route: its MAC stands in `neighbours`. */
#define HOP_ON_LINK (2ULL << 56)
/* There is no way. */
#define HOP_NONE (4ULL << 56)

/* In the tables in force. */
#define BACKEND_IN_PLAN 0x01
/* Its flows may be sent to it. */
#define BACKEND_ALIVE 0x02

/* A backend, by the number of the engine's state. */
struct backend {
    u64 hop;
    u8 address[16];
    u16 port;
    u8 flags;
    u8 reserved0;
    u32 service;
    /* Its cluster-wide number. */
    u32 id;
    u32 reserved1;
    u64 reserved[3];
};

#define SERVICE_IN_PLAN 1u
/* Flows of it are remembered. */
#define SERVICE_CONSULT 2u
/* All of its remembered flows are in the table: one that isn't there is not remembered. */
#define SERVICE_CONCLUSIVE 4u

/* A service, by the number of the engine's state. */
struct service {
    u32 flags;
    u32 group;
    u8 vip[16];
    u16 port;
    u16 reserved0;
    /* Number of its filter + 1; 0: none, every packet looks for its flow. */
    u32 filter;
    u32 reserved[8];
};

/* Which flows of a service may be remembered, so that the packets of the rest need not look for theirs: a bit for each 2^16th of what
 * their hash (hash_flow with HASH_SEED) may be. There are FILTERS of them, FILTER_LINES cache lines each. */
#define FILTERS 256
#define FILTER_LINES 128

struct filter_line {
    u64 bits[8];
};

/* As in lease.rs. */
struct lease {
    u64 group; /* + 1; 0 of an empty cell */
    u64 epoch;
    u64 answer_until;
    u64 forward_until;
    u64 reserved[4];
};

/* A flow's name as its client's packets carry it. */
struct flow_key {
    u8 client[16];
    u32 service;
    u16 client_port;
    u16 reserved;
};

/* A plain segment or datagram of either side changes nothing but `last_seen`; of others everything goes up. */
#define FLOW_STEADY 0x01
/* The backend knows it by a SNAT address and port. */
#define FLOW_BOUND 0x02
/* Its state is kept here: make.h. */
#define FLOW_KEPT 0x04
/* Above them: counts the changes of its state. */
#define FLOW_VERSION_SHIFT 3

/* A flow, in a cell of the pool: a cache line. As long as it is in `names` nothing of it changes but `last_seen` and the word of its state,
 * and a cell that was taken from there is left alone for a while (table.rs), so that whoever has just found it finds it unchanged. */
struct flow {
    u64 last_seen;
    u32 backend;
    /* These three are one word, which changes as a whole. */
    u8 flags;
    /* Of a kept flow its state: state.h. */
    u8 progress;
    u16 snat_port;
    u8 snat[16];
    u8 client[16];
    /* NOBODY: a name on the backend's side that is taken for a flow which is not there yet. */
    u32 service;
    u16 client_port;
    /* Of a bound flow. */
    u8 protocol;
    u8 reserved;
    /* Of the name on the client's side, and of that on the backend's: address and port of both ends, and the protocol. */
    u32 client_hash;
    u32 answers_hash;
};
#define NOBODY 0xffffffffu

/* Cells of a block of the pool. */
#define BLOCK_SHIFT 16
#define BLOCK_FLOWS (1 << BLOCK_SHIFT)

/* A line of the index: a cache line. A name stands in the line that its hash numbers or, where that is full, in one of those behind it,
 * INDEX_PROBES in all; and as long as that is so, the first one counts it. */
#define LINE_SLOTS 7
#define INDEX_PROBES 8
struct line {
    /* Names that stand behind this line. */
    u64 displaced;
    /* The hash, and in the lower half the number of the flow's cell + 1; 0: free. */
    u64 slots[LINE_SLOTS];
};

/* SNAT ports that flows are given here; engine/nat.rs has the same. */
#define SNAT_PORT_MIN 1024u
#define SNAT_PORT_UPPER 49152u

/* Cells that a processor has been given at a time, at most: engine/nat.rs MAX_HALF_OPEN. */
#define GRANT_CELLS 8192

/* How many flows a processor may have made since the program was loaded, and in which cells: what it takes as the n-th stands in `cells`
 * at n modulo GRANT_CELLS, and `given` of them have been written. */
struct grant {
    u64 most;
    u64 given;
    u64 reserved[6];
    u32 cells[GRANT_CELLS];
};

/* A flow was made, in the place of a closing one of the same name if there was one; or its state has changed. */
#define NEWS_OPENED 0
#define NEWS_CHANGED 1

/* Size of the ring `news`: some 58 000 pieces. */
#define NEWS_BYTES (1 << 22)

/* What happened to a kept flow, in that ring. */
struct news {
    struct flow_key flow;
    u64 now;
    u32 backend;
    /* As the flow has them now. */
    u8 flags;
    u8 progress;
    u16 snat_port;
    u8 snat[16];
    /* Processor. */
    u32 cpu;
    /* NEWS_* */
    u32 kind;
};

struct route_key {
    u32 prefix_len;
    u8 address[16];
};

struct neighbour_key {
    u8 address[16];
    u32 port;
};

struct host_key {
    u8 address[16];
};

/* What passed a backend on one processor: a cache line. */
struct traffic {
    u64 packets;
    u64 bytes;
    u64 return_packets;
    u64 return_bytes;
    u64 new_flows;
    u64 reserved[3];
};

/* Flows that are not remembered: engine/sketch.rs. */
struct seen {
    /* End of the window that is being filled. */
    u64 until;
    /* Its number. */
    u64 window;
    /* At `window & 1`, and the one before at the other place. */
    u8 registers[2][REGISTERS];
};

/* A reading of the clock: clock.h. */
struct clock {
    u64 now;
    /* Jiffies before it. */
    u64 ticks;
    /* Frames that it has served. */
    u64 uses;
    u64 reserved[5];
};

/* What became of frames on one processor. */
struct tally {
    struct clock clock;
    u64 events[TALLY_EVENTS];
    u64 drops[TALLY_DROPS];
    u64 up[TALLY_UP];
    /* Flows made. */
    u64 made;
    /* Cells taken for them: fewer, for a closing flow begins anew in its own. */
    u64 taken;
    u64 reserved[22];
};

#define CHECK_SIZE(type, size) _Static_assert(sizeof(struct type) == (size), "size of " #type)
#define CHECK_OFFSET(type, field, at) _Static_assert(__builtin_offsetof(struct type, field) == (at), #type "." #field)
CHECK_SIZE(port, 32);
CHECK_SIZE(config, 256);
CHECK_OFFSET(config, slack, 80);
CHECK_OFFSET(config, secrets, 128);
CHECK_SIZE(place, 20);
CHECK_SIZE(record, 96);
CHECK_SIZE(place_entry, 128);
CHECK_OFFSET(place_entry, record, 32);
CHECK_OFFSET(record, current, 16);
CHECK_OFFSET(record, vip, 32);
CHECK_OFFSET(record, reopen, 56);
CHECK_OFFSET(record, snat_count, 80);
CHECK_SIZE(slot_line, 64);
CHECK_SIZE(backend, 64);
CHECK_OFFSET(backend, port, 24);
CHECK_SIZE(service, 64);
CHECK_OFFSET(service, port, 24);
CHECK_OFFSET(service, filter, 28);
CHECK_SIZE(filter_line, 64);
CHECK_SIZE(lease, 64);
CHECK_SIZE(flow_key, 24);
CHECK_SIZE(flow, 64);
CHECK_OFFSET(flow, flags, 12);
CHECK_OFFSET(flow, snat_port, 14);
CHECK_OFFSET(flow, client, 32);
CHECK_OFFSET(flow, service, 48);
CHECK_OFFSET(flow, client_hash, 56);
CHECK_SIZE(line, 64);
CHECK_SIZE(route_key, 20);
CHECK_SIZE(neighbour_key, 20);
CHECK_SIZE(traffic, 64);
CHECK_SIZE(seen, 528);
CHECK_SIZE(clock, 64);
CHECK_SIZE(tally, 1024);
CHECK_SIZE(grant, 64 + 4 * GRANT_CELLS);
CHECK_SIZE(news, 64);

#endif
