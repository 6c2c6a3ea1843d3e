//! Which faults come, with what, and when: by the seed alone

use std::{fmt, time::Duration};

use fastrand::Rng;

/// How many there are of what can be hit
#[derive(Clone, Copy, Debug)]
pub(crate) struct Targets {
    pub(crate) members: usize,
    pub(crate) instances: usize,
    pub(crate) clients: usize,
}

/// What happens to whom, and how long it lasts
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) lasting: Duration,
}

/// What happens to whom
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// One member is killed, terminated or frozen
    Member(usize, Hit),
    /// The member that leads is frozen
    Leader,
    /// All members but this one are killed, or frozen
    Quorum { spared: usize, frozen: bool },
    /// All members are frozen
    AllMembers,
    /// All data are lost
    Wipe,
    /// The past is forgotten
    Compact,
    /// An operator deletes a key; which of them, in order
    DeleteKey(usize),
    /// An operator deletes all keys
    DeleteAll,
    /// A lease is revoked behind its owner's back; which of them, in order
    Revoke(usize),
    /// Someone's way to etcd, through one member's port or through all, is out of order
    Way { of: Who, through: Option<usize>, how: How },
    /// An instance is killed, and started again at its address or at another
    KillInstance { instance: usize, elsewhere: bool },
    /// An instance is told to leave, and started again
    RestartInstance(usize),
}

/// What a member suffers
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Hit {
    Kill,
    Terminate,
    Freeze,
}

/// Whose way
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Who {
    Client(usize),
    Instance(usize),
}

/// What is wrong with a way
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum How {
    BlackHole,
    /// Connections are reset once; new ones are not
    Reset,
    Refuse,
    Delay(Duration),
}

/// Faults that come together, each with the time at which it begins
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Round(pub(crate) Vec<(Duration, Fault)>);

/// Rounds without an end
#[derive(Debug)]
pub(crate) struct Schedule {
    random: Rng,
    targets: Targets,
}

/// A pause of this length is the longest that etcd itself takes as one.
const LONGEST_MS: u64 = 8_000;

impl Schedule {
    pub(crate) fn new(seed: u64, targets: Targets) -> Self {
        Self { random: Rng::with_seed(seed), targets }
    }

    fn lasting(&mut self, longest_ms: u64) -> Duration {
        Duration::from_millis(self.random.u64(500..=longest_ms))
    }

    /// Of etcd's processes
    fn member_fault(&mut self) -> Fault {
        let member = self.random.usize(..self.targets.members);
        let (kind, longest) = match self.random.u8(..8) {
            0 => (Kind::Member(member, Hit::Kill), LONGEST_MS),
            1 => (Kind::Member(member, Hit::Terminate), LONGEST_MS),
            2 => (Kind::Member(member, Hit::Freeze), LONGEST_MS),
            3 => (Kind::Leader, LONGEST_MS),
            4 => (Kind::Quorum { spared: member, frozen: false }, 5_000),
            5 => (Kind::Quorum { spared: member, frozen: true }, 5_000),
            6 => (Kind::AllMembers, LONGEST_MS),
            _ => (Kind::Wipe, 3_000),
        };
        Fault { kind, lasting: self.lasting(longest) }
    }

    /// Of what is in etcd
    fn store_fault(&mut self) -> Fault {
        let nth = self.random.usize(..self.targets.instances);
        let kind = match self.random.u8(..4) {
            0 => Kind::Compact,
            1 => Kind::DeleteKey(nth),
            2 => Kind::DeleteAll,
            _ => Kind::Revoke(nth),
        };
        Fault { kind, lasting: Duration::ZERO }
    }

    /// Of someone's way to etcd
    fn way_fault(&mut self) -> Fault {
        let of = if self.random.bool() {
            Who::Client(self.random.usize(..self.targets.clients))
        } else {
            Who::Instance(self.random.usize(..self.targets.instances))
        };
        let through = self.random.bool().then(|| self.random.usize(..self.targets.members));
        let how = match self.random.u8(..4) {
            0 => How::BlackHole,
            1 => How::Reset,
            2 => How::Refuse,
            _ => How::Delay(Duration::from_millis(self.random.u64(20..=400))),
        };
        let lasting = self.lasting(if how == How::Reset { 500 } else { LONGEST_MS });
        Fault { kind: Kind::Way { of, through, how }, lasting }
    }

    /// Of a server
    fn instance_fault(&mut self) -> Fault {
        let instance = self.random.usize(..self.targets.instances);
        let kind = match self.random.u8(..3) {
            0 => Kind::KillInstance { instance, elsewhere: false },
            1 => Kind::KillInstance { instance, elsewhere: true },
            _ => Kind::RestartInstance(instance),
        };
        Fault { kind, lasting: self.lasting(4_000) }
    }
}

impl Iterator for Schedule {
    type Item = Round;

    /// One fault, or a second one while the first lasts: nothing is asked of an etcd whose members are down
    fn next(&mut self) -> Option<Round> {
        let first = match self.random.u8(..4) {
            0 => self.member_fault(),
            1 => self.store_fault(),
            2 => self.way_fault(),
            _ => self.instance_fault(),
        };
        let mut round = vec![(Duration::ZERO, first)];
        if !first.lasting.is_zero() && self.random.bool() {
            let second = match (first.is_of_members(), self.random.bool()) {
                (_, true) => self.way_fault(),
                (true, false) => self.instance_fault(),
                (false, false) => self.store_fault(),
            };
            round.push((first.lasting.mul_f64(self.random.f64()), second));
        }
        Some(Round(round))
    }
}

impl Fault {
    /// Whether etcd itself is out of order
    pub(crate) fn is_of_members(&self) -> bool {
        matches!(
            self.kind,
            Kind::Member(..) | Kind::Leader | Kind::Quorum { .. } | Kind::AllMembers | Kind::Wipe
        )
    }
}

impl Round {
    /// Whether etcd itself is out of order
    pub(crate) fn is_of_members(&self) -> bool {
        self.0.iter().any(|(_, fault)| fault.is_of_members())
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (offset, fault)) in self.0.iter().enumerate() {
            if number > 0 {
                write!(f, "; {:.1} s later ", offset.as_secs_f64())?;
            }
            write!(f, "{fault}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Member(member, hit) => write!(f, "{hit:?} member {member}"),
            Kind::Leader => f.write_str("Freeze the leader"),
            Kind::Quorum { spared, frozen } => {
                write!(f, "{} all members but {spared}", if frozen { "Freeze" } else { "Kill" })
            }
            Kind::AllMembers => f.write_str("Freeze all members"),
            Kind::Wipe => f.write_str("Wipe etcd"),
            Kind::Compact => f.write_str("Compact"),
            Kind::DeleteKey(nth) => write!(f, "Delete key {nth}"),
            Kind::DeleteAll => f.write_str("Delete all keys"),
            Kind::Revoke(nth) => write!(f, "Revoke lease {nth}"),
            Kind::Way { of, through: Some(member), how } => write!(f, "{how:?} {of:?} at member {member}"),
            Kind::Way { of, through: None, how } => write!(f, "{how:?} {of:?} everywhere"),
            Kind::KillInstance { instance, elsewhere } => {
                write!(f, "Kill instance {instance}, again {}", if elsewhere { "elsewhere" } else { "there" })
            }
            Kind::RestartInstance(instance) => write!(f, "Restart instance {instance}"),
        }?;
        if self.lasting.is_zero() { Ok(()) } else { write!(f, " for {:.1} s", self.lasting.as_secs_f64()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: Targets = Targets { members: 3, instances: 20, clients: 5 };

    fn rounds(seed: u64) -> Vec<Round> {
        Schedule::new(seed, TARGETS).take(2_000).collect()
    }

    #[test]
    fn a_seed_gives_the_same_rounds_again_and_another_gives_others() {
        assert_eq!(rounds(7), rounds(7));
        assert_ne!(rounds(7), rounds(8));
    }

    #[test]
    fn nothing_is_asked_of_an_etcd_whose_members_are_down() {
        for Round(faults) in rounds(1) {
            let asks = |fault: &Fault| {
                let kind = fault.kind;
                matches!(kind, Kind::Compact | Kind::DeleteKey(_) | Kind::DeleteAll | Kind::Revoke(_))
            };
            let down = faults.iter().any(|(_, fault)| fault.is_of_members());
            assert!(!(down && faults.iter().any(|(_, fault)| asks(fault))), "{faults:?}");
        }
    }

    #[test]
    fn every_kind_comes() {
        let words: std::collections::BTreeSet<_> = rounds(1)
            .iter()
            .flat_map(|Round(faults)| faults.iter())
            .map(|(_, fault)| fault.to_string().split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect();
        for word in
            ["Kill member", "Terminate member", "Freeze member", "Freeze the", "Kill all", "Freeze all"]
        {
            assert!(words.contains(word), "{word} is not among {words:?}");
        }
        for word in
            ["Wipe etcd", "Delete key", "Delete all", "Revoke lease", "Kill instance", "Restart instance"]
        {
            assert!(words.contains(word), "{word} is not among {words:?}");
        }
        for how in ["Compact", "BlackHole", "Reset", "Refuse", "Delay"] {
            assert!(words.iter().any(|word| word.starts_with(how)), "{how} is not among {words:?}");
        }
    }
}
