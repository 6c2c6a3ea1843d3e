//! Users, the one role `root`, and tokens

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use super::refused::Refused;

/// The only role there can be, and the user that must have it.
const ROOT: &str = "root";

/// What a request must be allowed to do
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing; a token is not even looked at.
    Nothing,
    /// Nothing, but a token that comes along must be good: what etcd puts through raft.
    GoodToken,
    /// To read or write keys. Without key permissions this is root's alone.
    Keys,
    /// To manage users and roles.
    Admin,
}

/// Passwords are kept as they came: this is a server for tests, in the memory of the tests.
#[derive(Debug)]
pub(crate) struct Auth {
    enabled: bool,
    root_role: bool,
    users: BTreeMap<String, User>,
    tokens: HashMap<String, Token>,
    token_ttl: Duration,
}

#[derive(Debug)]
struct User {
    /// None: no password was set, none is accepted.
    password: Option<String>,
    root: bool,
}

#[derive(Debug)]
struct Token {
    user: String,
    deadline: Instant,
}

impl Auth {
    pub(crate) fn new(token_ttl: Duration) -> Self {
        let (users, tokens) = (BTreeMap::new(), HashMap::new());
        Self { enabled: false, root_role: false, users, tokens, token_ttl }
    }

    /// Whether the bearer of the token may; a token that is used lives on
    pub(crate) fn authorize(&mut self, now: Instant, token: Option<&str>, need: Need) -> Result<(), Refused> {
        if !self.enabled || need == Need::Nothing {
            return Ok(());
        }
        let user = token.map(|token| self.user_of(now, token)).transpose()?;
        match (need, user) {
            (Need::Nothing | Need::GoodToken, _) => Ok(()),
            (_, None) => Err(Refused::UserEmpty),
            (_, Some(user)) if self.users.get(&user).is_some_and(|user| user.root) => Ok(()),
            _ => Err(Refused::PermissionDenied),
        }
    }

    fn user_of(&mut self, now: Instant, token: &str) -> Result<String, Refused> {
        let deadline = now + self.token_ttl;
        let known = self.tokens.get_mut(token).filter(|token| token.deadline > now);
        let token = known.ok_or(Refused::InvalidAuthToken)?;
        token.deadline = deadline;
        Ok(token.user.clone())
    }

    pub(crate) fn enable(&mut self) -> Result<(), Refused> {
        if self.enabled {
            return Ok(());
        }
        let root = self.users.get(ROOT).ok_or(Refused::RootUserNotExist)?;
        if !root.root {
            return Err(Refused::RootRoleNotGranted);
        }
        self.enabled = true;
        Ok(())
    }

    pub(crate) fn disable(&mut self) {
        self.enabled = false;
        self.tokens.clear();
    }

    /// A new token for a user who knows the password
    pub(crate) fn authenticate(
        &mut self,
        now: Instant,
        name: &str,
        password: &str,
        random: &mut fastrand::Rng,
    ) -> Result<String, Refused> {
        if !self.enabled {
            return Err(Refused::AuthNotEnabled);
        }
        let user = self.users.get(name).ok_or(Refused::AuthFailed)?;
        if user.password.as_deref() != Some(password) {
            return Err(Refused::AuthFailed);
        }
        // Logins are the only thing that adds tokens, so they also sweep.
        self.tokens.retain(|_, token| token.deadline > now);
        let letters: String = std::iter::repeat_with(|| random.alphabetic()).take(16).collect();
        let token = format!("{letters}.{}", random.u32(..));
        let deadline = now + self.token_ttl;
        self.tokens.insert(token.clone(), Token { user: name.to_owned(), deadline });
        Ok(token)
    }

    pub(crate) fn expire_tokens(&mut self) {
        self.tokens.clear();
    }

    pub(crate) fn add_user(&mut self, name: String, password: Option<String>) -> Result<(), Refused> {
        if name.is_empty() {
            return Err(Refused::UserEmpty);
        }
        if self.users.contains_key(&name) {
            return Err(Refused::UserAlreadyExist);
        }
        self.users.insert(name, User { password, root: false });
        Ok(())
    }

    pub(crate) fn delete_user(&mut self, name: &str) -> Result<(), Refused> {
        if self.enabled && name == ROOT {
            return Err(Refused::InvalidAuthManagement);
        }
        self.users.remove(name).ok_or(Refused::UserNotFound)?;
        self.forget_tokens_of(name);
        Ok(())
    }

    pub(crate) fn change_password(&mut self, name: &str, password: String) -> Result<(), Refused> {
        self.user_mut(name)?.password = Some(password);
        self.forget_tokens_of(name);
        Ok(())
    }

    /// The roles of a user
    pub(crate) fn user(&self, name: &str) -> Result<Vec<String>, Refused> {
        let user = self.users.get(name).ok_or(Refused::UserNotFound)?;
        Ok(user.root.then(|| ROOT.to_owned()).into_iter().collect())
    }

    /// Whether the token is this user's
    pub(crate) fn is_token_of(&self, token: &str, name: &str) -> bool {
        self.tokens.get(token).is_some_and(|token| token.user == name)
    }

    pub(crate) fn users(&self) -> Vec<String> {
        self.users.keys().cloned().collect()
    }

    pub(crate) fn grant_role(&mut self, name: &str, role: &str) -> Result<(), Refused> {
        let user = self.user_mut(name)?;
        // In etcd, too, root can be granted before it is added.
        if role != ROOT {
            return Err(Refused::RoleNotFound);
        }
        user.root = true;
        Ok(())
    }

    pub(crate) fn revoke_role(&mut self, name: &str, role: &str) -> Result<(), Refused> {
        if self.enabled && name == ROOT && role == ROOT {
            return Err(Refused::InvalidAuthManagement);
        }
        let user = self.user_mut(name)?;
        if role != ROOT || !user.root {
            return Err(Refused::RoleNotGranted);
        }
        user.root = false;
        Ok(())
    }

    pub(crate) fn add_role(&mut self, role: &str) -> Result<(), Refused> {
        if role != ROOT {
            return Err(Refused::Unimplemented("any role but root"));
        }
        if std::mem::replace(&mut self.root_role, true) {
            return Err(Refused::RoleAlreadyExist);
        }
        Ok(())
    }

    pub(crate) fn roles(&self) -> Vec<String> {
        self.root_role.then(|| ROOT.to_owned()).into_iter().collect()
    }

    fn user_mut(&mut self, name: &str) -> Result<&mut User, Refused> {
        self.users.get_mut(name).ok_or(Refused::UserNotFound)
    }

    fn forget_tokens_of(&mut self, name: &str) {
        self.tokens.retain(|_, token| token.user != name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);

    fn enabled() -> Auth {
        let mut auth = Auth::new(TTL);
        auth.add_user(ROOT.to_owned(), Some("secret".to_owned())).unwrap();
        auth.add_role(ROOT).unwrap();
        auth.grant_role(ROOT, ROOT).unwrap();
        auth.enable().unwrap();
        auth
    }

    fn login(auth: &mut Auth, now: Instant) -> String {
        auth.authenticate(now, ROOT, "secret", &mut fastrand::Rng::with_seed(7)).unwrap()
    }

    #[test]
    fn a_token_lives_as_long_as_it_is_used() {
        let (mut auth, start) = (enabled(), Instant::now());
        let token = login(&mut auth, start);
        let later = start + TTL - Duration::from_secs(1);
        assert_eq!(auth.authorize(later, Some(&token), Need::Keys), Ok(()));
        let later = later + TTL - Duration::from_secs(1);
        assert_eq!(auth.authorize(later, Some(&token), Need::Keys), Ok(()));
        let later = later + TTL;
        assert_eq!(auth.authorize(later, Some(&token), Need::Keys), Err(Refused::InvalidAuthToken));
    }

    #[test]
    fn a_changed_password_ends_the_tokens_of_its_user() {
        let (mut auth, now) = (enabled(), Instant::now());
        let token = login(&mut auth, now);
        auth.change_password(ROOT, "other".to_owned()).unwrap();
        assert_eq!(auth.authorize(now, Some(&token), Need::GoodToken), Err(Refused::InvalidAuthToken));
    }

    #[test]
    fn auth_cannot_be_enabled_without_a_root_that_is_root() {
        let mut auth = Auth::new(TTL);
        assert_eq!(auth.enable(), Err(Refused::RootUserNotExist));
        auth.add_user(ROOT.to_owned(), Some("secret".to_owned())).unwrap();
        assert_eq!(auth.enable(), Err(Refused::RootRoleNotGranted));
    }
}
