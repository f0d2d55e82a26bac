/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * Reads an untagged IP packet, with the checks of `src/wire/dissect.rs`. Whatever is out of the ordinary is only told apart as far as
 * is needed to know whose business it is.
 */
#ifndef KOMAINU_PARSE_H
#define KOMAINU_PARSE_H

#include "checksum.h"
#include "state.h"
#include "verdict.h"

#define ETH_LEN 14
#define IPV4_LEN 20
#define IPV6_LEN 40
#define TCP_LEN 20
#define UDP_LEN 8

#define PROTO_HOP_BY_HOP 0
#define PROTO_ICMP 1
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_ICMPV6 58
#define PROTO_DEST_OPTIONS 60

struct packet {
    /* Addresses as the maps hold them. */
    u32 src[4];
    u32 dst[4];
    u16 src_port;
    u16 dst_port;
    /* Length of the IP packet. */
    u32 len;
    /* Length of its headers, IP and L4. */
    u16 headers;
    u8 protocol;
    u8 ttl;
    u8 flags;
    u8 reserved[3];
};

enum parsed {
    PARSED,        /* TCP or UDP */
    PARSED_SHORT,  /* without addresses */
    PARSED_BROKEN, /* addresses only */
    PARSED_FRAGMENT,
    PARSED_OPTIONS,
    PARSED_ICMP,
    PARSED_OTHER,
};

/* Length of the frame, also of what is not directly accessible. */
INLINE u32 frame_len(context *ctx)
{
#ifdef KOMAINU_XDP
    return (u32)xdp_buff_len(ctx);
#else
    return ctx->len;
#endif
}

/* TCP or UDP at `at` bytes behind the Ethernet header, `len` bytes of it. */
INLINE enum parsed parse_l4(void *l4, void *end, u32 len, struct packet *p)
{
    if (p->protocol == PROTO_TCP) {
        u8 *tcp = l4;
        if (len < TCP_LEN || (void *)(tcp + TCP_LEN) > end)
            return PARSED_BROKEN;
        u32 header = (tcp[12] >> 4) * 4;
        if (header < TCP_LEN || header > len)
            return PARSED_BROKEN;
        p->src_port = *(u16 *)tcp;
        p->dst_port = *(u16 *)(tcp + 2);
        p->flags = tcp[13];
        p->headers += header;
        return PARSED;
    }
    u8 *udp = l4;
    if (len < UDP_LEN || (void *)(udp + UDP_LEN) > end)
        return PARSED_BROKEN;
    u32 stated = swap16(*(u16 *)(udp + 4));
    if (stated < UDP_LEN || stated > len)
        return PARSED_BROKEN;
    p->src_port = *(u16 *)udp;
    p->dst_port = *(u16 *)(udp + 2);
    p->headers += UDP_LEN;
    return PARSED;
}

INLINE enum parsed parse_v4(context *ctx, struct packet *p)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    if (data + ETH_LEN + IPV4_LEN > end)
        return PARSED_SHORT;
    u8 *ip = data + ETH_LEN;
    p->src[0] = p->src[1] = p->dst[0] = p->dst[1] = 0;
    p->src[2] = p->dst[2] = swap32(0xffff);
    p->src[3] = *(u32 *)(ip + 12);
    p->dst[3] = *(u32 *)(ip + 16);
    p->protocol = ip[9];
    p->ttl = ip[8];
    p->flags = 0;
    if ((ip[0] >> 4) != 4)
        return PARSED_BROKEN;
    u32 header = (ip[0] & 0xf) * 4;
    if (header < IPV4_LEN)
        return PARSED_BROKEN;
    p->len = swap16(*(u16 *)(ip + 2));
    if (p->len < header)
        return PARSED_BROKEN;
    if (unlikely(p->len > (u32)(end - data) - ETH_LEN) && p->len + ETH_LEN > frame_len(ctx))
        return PARSED_BROKEN;
    if (header > IPV4_LEN)
        return PARSED_OPTIONS;
    u64 sum = 0;
#pragma unroll
    for (int i = 0; i < IPV4_LEN; i += 4)
        sum += *(u32 *)(ip + i);
    if (sum_fold(sum) != 0xffff)
        return PARSED_BROKEN;
    /* Offset or more fragments; the bit above them means nothing. */
    if (*(u16 *)(ip + 6) & swap16(0x3fff))
        return PARSED_FRAGMENT;
    p->headers = IPV4_LEN;
    if (p->protocol == PROTO_TCP || p->protocol == PROTO_UDP)
        return parse_l4(ip + IPV4_LEN, end, p->len - IPV4_LEN, p);
    return p->protocol == PROTO_ICMP ? PARSED_ICMP : PARSED_OTHER;
}

INLINE enum parsed parse_v6(context *ctx, struct packet *p)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    if (data + ETH_LEN + IPV6_LEN > end)
        return PARSED_SHORT;
    u8 *ip = data + ETH_LEN;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        p->src[i] = *(u32 *)(ip + 8 + 4 * i);
        p->dst[i] = *(u32 *)(ip + 24 + 4 * i);
    }
    p->protocol = ip[6];
    p->ttl = ip[7];
    p->flags = 0;
    if ((ip[0] >> 4) != 6)
        return PARSED_BROKEN;
    p->len = IPV6_LEN + swap16(*(u16 *)(ip + 4));
    if (unlikely(p->len > (u32)(end - data) - ETH_LEN) && p->len + ETH_LEN > frame_len(ctx))
        return PARSED_BROKEN;
    p->headers = IPV6_LEN;
    switch (p->protocol) {
    case PROTO_TCP:
    case PROTO_UDP:
        return parse_l4(ip + IPV6_LEN, end, p->len - IPV6_LEN, p);
    case PROTO_ICMPV6:
        return PARSED_ICMP;
    case PROTO_FRAGMENT:
        return PARSED_FRAGMENT;
    case PROTO_HOP_BY_HOP:
    case PROTO_ROUTING:
    case PROTO_DEST_OPTIONS:
        return PARSED_OPTIONS;
    default:
        return PARSED_OTHER;
    }
}

/* An IPv4-mapped address in an IPv6 packet: the maps would take it for an IPv4 address. */
INLINE int is_mapped(const u32 *address)
{
    return !(address[0] | address[1]) && address[2] == swap32(0xffff);
}

#endif
