//! Lists and removes nftables tables, chains and jump rules over netlink.
//!
//! The agent's image has no `nft`, and rules must be removed by handle, not by a tool's output. Of
//! a rule only the target chain is read. `iptables-nft` keeps its rules here, too. Knows nothing of
//! kube-proxy.

use std::{collections::BTreeSet, fmt, io};

use nix::sys::socket::SockProtocol;

use super::{
    socket::{ACK, DONE, DUMP, ERROR, NetlinkSocket, REQUEST},
    wire::{attribute, error_of, messages, parse, put_bytes, put_text, text},
};

/// `linux/netlink.h`: flag of a dump that is not consistent.
const INTERRUPTED: u16 = 0x10;
/// `linux/netfilter/nfnetlink.h`
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `linux/netfilter/nf_tables.h`
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;
/// Attributes of tables, chains and rules; in each, the first names the table.
const NAME: u16 = 1;
const CHAIN_NAME: u16 = 3;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;

/// Bytes of one transaction: below a socket's default send buffer.
const BATCH_BYTES: usize = 64 * 1024;
/// How often an inconsistent dump is repeated.
const DUMP_ATTEMPTS: u32 = 10;

/// Address family of a table: the kernel's `NFPROTO_*` number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Family(pub u8);

/// An nftables table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table {
    pub family: Family,
    pub name: String,
}

/// A chain of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chain {
    pub table: Table,
    pub name: String,
}

/// A rule with a jump or goto to another chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Jump {
    pub from: Chain,
    pub handle: u64,
    /// Name of a chain of the same table.
    pub to: String,
}

/// An object to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// A table with all its chains and rules.
    Table(Table),
    /// One rule.
    Rule(Jump),
    /// All rules of a chain.
    Rules(Chain),
    /// A chain without rules that no rule jumps to.
    Chain(Chain),
}

/// A netfilter netlink socket of the calling thread's network namespace.
#[derive(Debug)]
pub struct Nftables {
    socket: NetlinkSocket,
}

impl Family {
    pub const IPV4: Self = Self(2);
    pub const IPV6: Self = Self(10);
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("inet"),
            2 => f.write_str("ip"),
            3 => f.write_str("arp"),
            5 => f.write_str("netdev"),
            7 => f.write_str("bridge"),
            10 => f.write_str("ip6"),
            other => write!(f, "family {other}"),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.table, self.name)
    }
}

impl Nftables {
    /// Opens the socket.
    ///
    /// # Errors
    ///
    /// The kernel has no netfilter, or the process lacks permission.
    pub fn open() -> io::Result<Self> {
        let socket = NetlinkSocket::open(SockProtocol::NetlinkNetFilter)?;
        // the errors of a whole batch arrive at once
        socket.set_receive_buffer(1 << 20)?;
        Ok(Self { socket })
    }

    pub fn tables(&mut self) -> io::Result<Vec<Table>> {
        self.dump(GET_TABLE, Family(0), NEW_TABLE, &[], |family, attributes| {
            Some(Table { family, name: text(attributes, NAME)? })
        })
    }

    pub fn chains(&mut self) -> io::Result<Vec<Chain>> {
        self.dump(GET_CHAIN, Family(0), NEW_CHAIN, &[], |family, attributes| {
            let table = Table { family, name: text(attributes, NAME)? };
            Some(Chain { table, name: text(attributes, CHAIN_NAME)? })
        })
    }

    /// Rules of a table whose action is a jump or goto to another chain, whatever they match.
    pub fn jumps(&mut self, table: &Table) -> io::Result<Vec<Jump>> {
        let mut of_table = Vec::new();
        put_text(&mut of_table, NAME, &table.name);
        self.dump(GET_RULE, table.family, NEW_RULE, &of_table, |family, attributes| {
            let found = Table { family, name: text(attributes, NAME)? };
            // kernels before 5.x return the rules of all tables
            let from = Chain { table: found, name: text(attributes, RULE_CHAIN)? };
            let handle = attribute(attributes, RULE_HANDLE)?.try_into().ok().map(u64::from_be_bytes)?;
            let to = parse(attribute(attributes, RULE_EXPRESSIONS)?)
                .find_map(|(_, element)| jump_target(element))?;
            Some(Jump { from, handle, to }).filter(|jump| jump.from.table == *table)
        })
    }

    /// Removes the objects in this order, in one or more transactions. Each transaction is atomic.
    ///
    /// # Errors
    ///
    /// The first error. Earlier transactions stay committed.
    pub fn remove(&mut self, removals: &[Removal]) -> io::Result<()> {
        let mut rest = removals;
        while !rest.is_empty() {
            let mut batch = Vec::new();
            self.put(&mut batch, BATCH_BEGIN, REQUEST, Family(0), SUBSYSTEM, &[]);
            let mut taken = 0;
            while let Some(removal) = rest.get(taken).filter(|_| batch.len() < BATCH_BYTES) {
                let is_last = taken + 1 == rest.len() || batch.len() + 1_024 >= BATCH_BYTES;
                let (kind, family, attributes) = removal.encode();
                // the kernel reports each failure, and acknowledges the last message
                let flags = if is_last { REQUEST | ACK } else { REQUEST };
                self.put(&mut batch, SUBSYSTEM << 8 | kind, flags, family, 0, &attributes);
                taken += 1;
                if is_last {
                    break;
                }
            }
            let last = self.socket.sequence;
            self.put(&mut batch, BATCH_END, REQUEST, Family(0), SUBSYSTEM, &[]);
            self.socket.send(&batch)?;
            self.wait_for_ack(last)?;
            rest = rest.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads the responses to a batch up to the one to its last message.
    fn wait_for_ack(&self, last: u32) -> io::Result<()> {
        let mut failed = None;
        loop {
            let buffer = self.socket.receive()?;
            for message in messages(&buffer) {
                if message.kind != ERROR {
                    continue;
                }
                let errno = error_of(message.body);
                if errno != 0 && failed.is_none() {
                    failed = Some(io::Error::from_raw_os_error(errno));
                }
                // an error of the whole batch has the sequence number of its first message
                if message.sequence >= last || errno != 0 {
                    return failed.map_or(Ok(()), Err);
                }
            }
        }
    }

    fn dump<T: Ord>(
        &mut self,
        get: u16,
        family: Family,
        new: u16,
        attributes: &[u8],
        mut read: impl FnMut(Family, &[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut request = Vec::new();
            self.put(&mut request, SUBSYSTEM << 8 | get, REQUEST | DUMP, family, 0, attributes);
            self.socket.send(&request)?;
            let mut found = BTreeSet::new();
            if self.collect(new, &mut |family, attributes| found.extend(read(family, attributes)))? {
                return Ok(found.into_iter().collect());
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "nftables changed during each dump; retry later"))
    }

    /// Reads a dump to its end. Returns false if the ruleset changed meanwhile.
    fn collect(&self, new: u16, each: &mut dyn FnMut(Family, &[u8])) -> io::Result<bool> {
        let mut consistent = true;
        loop {
            let buffer = self.socket.receive()?;
            for message in messages(&buffer) {
                if message.sequence != self.socket.sequence {
                    continue;
                }
                consistent &= message.flags & INTERRUPTED == 0;
                match message.kind {
                    DONE => return Ok(consistent),
                    ERROR => match error_of(message.body) {
                        0 => {}
                        // the table was removed meanwhile
                        nix::libc::ENOENT => return Ok(consistent),
                        nix::libc::EINTR => return Ok(false),
                        errno => return Err(io::Error::from_raw_os_error(errno)),
                    },
                    kind if kind == SUBSYSTEM << 8 | new => {
                        if let (Some(family), Some(attributes)) =
                            (message.body.first(), message.body.get(4..))
                        {
                            each(Family(*family), attributes);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Appends a message: header, `nfgenmsg`, attributes.
    fn put(
        &mut self,
        batch: &mut Vec<u8>,
        kind: u16,
        flags: u16,
        family: Family,
        resource: u16,
        attributes: &[u8],
    ) {
        let [high, low] = resource.to_be_bytes();
        self.socket.put(batch, kind, flags, &[&[family.0, 0, high, low], attributes]);
    }
}

impl Removal {
    fn encode(&self) -> (u16, Family, Vec<u8>) {
        let mut attributes = Vec::new();
        let (kind, table) = match self {
            Self::Table(table) => {
                put_text(&mut attributes, NAME, &table.name);
                (DELETE_TABLE, table)
            }
            Self::Rule(Jump { from, handle, .. }) => {
                put_text(&mut attributes, NAME, &from.table.name);
                put_text(&mut attributes, RULE_CHAIN, &from.name);
                put_bytes(&mut attributes, RULE_HANDLE, &handle.to_be_bytes());
                (DELETE_RULE, &from.table)
            }
            Self::Rules(chain) => {
                put_text(&mut attributes, NAME, &chain.table.name);
                put_text(&mut attributes, RULE_CHAIN, &chain.name);
                (DELETE_RULE, &chain.table)
            }
            Self::Chain(chain) => {
                put_text(&mut attributes, NAME, &chain.table.name);
                put_text(&mut attributes, CHAIN_NAME, &chain.name);
                (DELETE_CHAIN, &chain.table)
            }
        };
        (kind, table.family, attributes)
    }
}

/// The target chain of an expression, if it is a jump or goto.
fn jump_target(expression: &[u8]) -> Option<String> {
    if text(expression, EXPRESSION_NAME)? != "immediate" {
        return None;
    }
    let data = attribute(attribute(expression, EXPRESSION_DATA)?, IMMEDIATE_DATA)?;
    text(attribute(data, DATA_VERDICT)?, VERDICT_CHAIN)
}
