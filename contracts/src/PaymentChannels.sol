// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {EntryGate} from "./entry/EntryGate.sol";

/// @title PaymentChannels: unidirectional channels, paid by cumulative EIP-712 vouchers
/// @notice A payer deposits once; its signer hands the payee vouchers, each stating all that was ever earned on the channel.
/// Only the highest one matters, so millions of payments settle in one transaction.
///
/// What holds, whatever anyone does:
/// - the payee can take exactly what the signer has signed, at any time until the channel is closed, and never more than the deposit;
/// - the payer gets the rest back, at the latest `closeWindow` after asking, and cannot take back what was vouchered before then;
/// - `claimed` never falls, a channel's id never recurs, and nobody but payer and payee ever receives a channel's tokens;
/// - nobody owns or upgrades this contract; a guardian may pause `open` and `topUp` (see EntryGate) and nothing else.
///
/// Signers are plain keys (65-byte or EIP-2098 signatures with a low s): the signer is a hot key with a deposit as its limit.
/// Tokens sent here other than by `open` and `topUp` belong to nobody and stay.
contract PaymentChannels is EIP712, ReentrancyGuardTransient, EntryGate {
    using SafeERC20 for IERC20;

    /// @notice One channel in three storage slots, laid out so that a redemption or a push touches only the first two.
    /// @dev A closed channel is deleted: its signer is zero, which no signature recovers to.
    struct Channel {
        address signer; // whose vouchers count
        uint96 deposit; // all that was ever paid in, base units
        address payee;
        uint96 claimed; // all that the payee was ever paid or credited, base units; at most `deposit`
        address payer;
        uint40 expiresAt; // unix seconds; from then on the payer may close without asking
        uint40 closesAt; // unix seconds; 0 while no close was requested
    }

    /// @notice One item of `redeemMany`: a voucher with its EIP-2098 compact signature, four words of calldata in all.
    struct Claim {
        bytes32 id;
        uint96 cumulative;
        bytes32 r;
        bytes32 vs;
    }

    /// @notice EIP-712 type of a payment: the signer owes the payee `cumulative` base units in all on this channel.
    bytes32 public constant VOUCHER_TYPEHASH = keccak256("Voucher(bytes32 channel,uint96 cumulative)");

    /// @notice EIP-712 type of a payee's consent to close at once with `cumulative` base units in all.
    bytes32 public constant CLOSE_TYPEHASH = keccak256("Close(bytes32 channel,uint96 cumulative)");

    /// @notice The longest close window a deployment may choose: a payer's exit is never further away.
    uint40 public constant CLOSE_WINDOW_MAX = 30 days;

    /// @notice Seconds between `requestClose` and `close`, in which the payee redeems what it holds.
    uint40 public immutable closeWindow;

    /// @notice How many channels a payer has opened; the next one's id follows from it (`channelId`).
    mapping(address payer => uint256) public openNonce;

    /// @notice Base units credited to a payee by `redeemMany`, `push` and `cooperativeClose`, to be pulled with `withdraw`.
    mapping(address payee => uint256) public credited;

    mapping(bytes32 id => Channel) private _channels;

    event Opened(
        bytes32 indexed id,
        address indexed payer,
        address indexed payee,
        address signer,
        uint96 amount,
        uint40 expiresAt
    );
    event ToppedUp(bytes32 indexed id, uint96 amount, uint96 deposit, uint40 expiresAt);
    /// @notice `amount` was paid or credited to the payee; `cumulative` is the channel's new `claimed`.
    event Redeemed(bytes32 indexed id, address indexed payee, uint96 amount, uint96 cumulative);
    event CloseRequested(bytes32 indexed id, uint40 closesAt);
    event Closed(bytes32 indexed id, uint96 refunded);
    event Withdrawn(address indexed payee, address to, uint256 amount);
    /// @notice An item of a batch was left out; `reason` is the selector of the error that it alone would have reverted with.
    event ClaimSkipped(bytes32 indexed id, bytes4 reason);

    /// @notice The close window is zero or longer than `CLOSE_WINDOW_MAX`.
    error InvalidCloseWindow(uint40 closeWindow);
    /// @notice The payee is zero, this contract or the token: nobody could ever receive its payments.
    error InvalidPayee(address payee);
    /// @notice The signer is zero: no voucher could ever be signed.
    error InvalidSigner();
    /// @notice The amount is zero.
    error ZeroAmount();
    /// @notice The expiry is not in the future, or earlier than the one that the channel already promises.
    error InvalidExpiry(uint40 expiresAt, uint256 earliest);
    /// @notice No such channel: never opened, or closed already.
    error UnknownChannel(bytes32 id);
    /// @notice The caller is not the channel's payer.
    error NotPayer(bytes32 id, address caller);
    /// @notice The caller, or whoever made the signature, is not the channel's signer.
    error NotSigner(bytes32 id, address actual);
    /// @notice The closing statement was not signed by the channel's payee.
    error NotPayee(bytes32 id, address actual);
    /// @notice The amount is above the deposit: the payee must not have accepted this voucher.
    error AboveDeposit(bytes32 id, uint96 cumulative, uint96 deposit);
    /// @notice The channel has already paid `claimed`, which is as much or more.
    error NothingToRedeem(bytes32 id, uint96 cumulative, uint96 claimed);
    /// @notice A close was requested: the channel takes no more money and no second request.
    error AlreadyClosing(bytes32 id, uint40 closesAt);
    /// @notice The channel may be closed only from `closableAt` on; 0 when nobody has requested it.
    error TooEarly(bytes32 id, uint40 closesAt, uint40 expiresAt);
    /// @notice The two lists differ in length.
    error LengthMismatch(uint256 ids, uint256 cumulatives);
    /// @notice Nothing is credited to the caller.
    error NothingCredited(address payee);
    /// @notice The recipient is zero or this contract.
    error InvalidRecipient(address to);

    /// @param token_ The ERC-20 of every channel: exact transfers only, no rebasing.
    /// @param closeWindow_ Seconds that payees have after a close request, 1 to `CLOSE_WINDOW_MAX`.
    /// @param guardian_ Who may pause `open` and `topUp`; zero for nobody.
    /// @param depositMax_ The most that one channel may hold unclaimed, base units; zero for no limit.
    /// @param totalMax_ The most that this contract may hold, base units; zero for no limit.
    constructor(IERC20 token_, uint40 closeWindow_, address guardian_, uint96 depositMax_, uint256 totalMax_)
        EIP712("gpumarket PaymentChannels", "1")
        EntryGate(token_, guardian_, depositMax_, totalMax_)
    {
        if (closeWindow_ == 0 || closeWindow_ > CLOSE_WINDOW_MAX) revert InvalidCloseWindow(closeWindow_);
        closeWindow = closeWindow_;
    }

    // ------------------------------------------------------------------ paying in

    /// @notice Opens a channel from the caller to `payee` with `amount` pulled from the caller.
    /// @param signer Whose vouchers count: the caller itself, or a hot key whose reach is this deposit.
    /// @param expiresAt Unix seconds until which the payer cannot close without `requestClose`.
    /// @return id The channel's id, `channelId(caller, payee, openNonce(caller))` before the call.
    function open(address payee, address signer, uint96 amount, uint40 expiresAt)
        external
        nonReentrant
        whileEntryIsOpen
        returns (bytes32 id)
    {
        if (payee == address(0) || payee == address(this) || payee == address(token)) revert InvalidPayee(payee);
        if (signer == address(0)) revert InvalidSigner();
        if (amount == 0) revert ZeroAmount();
        if (expiresAt <= block.timestamp) revert InvalidExpiry(expiresAt, block.timestamp + 1);
        id = channelId(msg.sender, payee, openNonce[msg.sender]++);
        _channels[id] = Channel({
            signer: signer,
            deposit: amount,
            payee: payee,
            claimed: 0,
            payer: msg.sender,
            expiresAt: expiresAt,
            closesAt: 0
        });
        emit Opened(id, msg.sender, payee, signer, amount, expiresAt);
        _takeIn(amount, amount);
    }

    /// @notice Adds to the caller's channel and may extend it; the expiry never shrinks. Either change alone is fine.
    function topUp(bytes32 id, uint96 amount, uint40 newExpiresAt) external nonReentrant whileEntryIsOpen {
        Channel storage channel_ = _payersChannel(id);
        uint40 expiresAt = channel_.expiresAt;
        if (channel_.closesAt != 0) revert AlreadyClosing(id, channel_.closesAt);
        if (newExpiresAt < expiresAt || newExpiresAt <= block.timestamp) {
            revert InvalidExpiry(newExpiresAt, expiresAt > block.timestamp ? expiresAt : block.timestamp + 1);
        }
        if (amount == 0 && newExpiresAt == expiresAt) revert ZeroAmount();
        uint96 deposit = channel_.deposit + amount;
        channel_.deposit = deposit;
        channel_.expiresAt = newExpiresAt;
        emit ToppedUp(id, amount, deposit, newExpiresAt);
        if (amount != 0) _takeIn(amount, deposit - channel_.claimed);
    }

    // ------------------------------------------------------------------ paying out

    /// @notice Redeems one voucher and pays its payee directly. Anyone may send it: only the payee can profit.
    /// @param signature 65 bytes (r, s, v) over `voucherDigest(id, cumulative)`.
    function redeem(bytes32 id, uint96 cumulative, bytes calldata signature) external nonReentrant {
        address actual = ECDSA.recoverCalldata(voucherDigest(id, cumulative), signature);
        Channel storage channel_ = _channels[id];
        (address signer, uint96 deposit) = (channel_.signer, channel_.deposit);
        if (signer == address(0)) revert UnknownChannel(id);
        if (actual != signer) revert NotSigner(id, actual);
        if (cumulative > deposit) revert AboveDeposit(id, cumulative, deposit);
        (address payee, uint96 claimed) = (channel_.payee, channel_.claimed);
        if (cumulative <= claimed) revert NothingToRedeem(id, cumulative, claimed);
        token.safeTransfer(payee, _advance(channel_, id, payee, claimed, cumulative));
    }

    /// @notice Redeems vouchers of any channels to the payees' credited balances. Anyone may send it.
    /// @dev Any bad item is skipped with `ClaimSkipped`: in a batch collected from strangers one stale voucher must not cost the
    /// others their turn. Consecutive items of one payee share a single write of its balance: sort by payee.
    function redeemMany(Claim[] calldata claims) external {
        bytes32 domain = _domainSeparatorV4();
        address payee;
        uint256 sum;
        for (uint256 i = 0; i < claims.length; ++i) {
            Claim calldata claim = claims[i];
            (address owner, uint96 amount, bytes4 reason) = _tryClaim(claim, domain);
            if (reason != 0) {
                emit ClaimSkipped(claim.id, reason);
                continue;
            }
            if (owner != payee) {
                if (sum != 0) _credit(payee, sum);
                (payee, sum) = (owner, 0);
            }
            sum += amount;
        }
        if (sum != 0) _credit(payee, sum);
    }

    /// @notice The signer itself advances many channels, without signatures: each payee is credited up to `cumulatives[i]`.
    /// @dev What others can bring about between signing and mining, a redemption by the payee or a close by the payer, skips the item,
    /// else one payee could block all others. What only the caller's own mistake can bring about reverts: a channel of another signer,
    /// an amount above a deposit (deposits only grow), lists that do not match.
    function push(bytes32[] calldata ids, uint96[] calldata cumulatives) external {
        if (ids.length != cumulatives.length) revert LengthMismatch(ids.length, cumulatives.length);
        for (uint256 i = 0; i < ids.length; ++i) {
            (bytes32 id, uint96 cumulative) = (ids[i], cumulatives[i]);
            Channel storage channel_ = _channels[id];
            (address signer, uint96 deposit) = (channel_.signer, channel_.deposit);
            if (signer == address(0)) {
                emit ClaimSkipped(id, UnknownChannel.selector);
                continue;
            }
            if (signer != msg.sender) revert NotSigner(id, msg.sender);
            if (cumulative > deposit) revert AboveDeposit(id, cumulative, deposit);
            (address payee, uint96 claimed) = (channel_.payee, channel_.claimed);
            if (cumulative <= claimed) {
                emit ClaimSkipped(id, NothingToRedeem.selector);
                continue;
            }
            _credit(payee, _advance(channel_, id, payee, claimed, cumulative));
        }
    }

    /// @notice Pays the caller's credited balance to `to`, which need not be the caller: a payee that the token refuses still gets out.
    function withdraw(address to) external nonReentrant {
        if (to == address(0) || to == address(this)) revert InvalidRecipient(to);
        uint256 amount = credited[msg.sender];
        if (amount == 0) revert NothingCredited(msg.sender);
        credited[msg.sender] = 0;
        emit Withdrawn(msg.sender, to, amount);
        token.safeTransfer(to, amount);
    }

    // ------------------------------------------------------------------ closing

    /// @notice Closes at once with the payee's consent: the payee ends with `cumulative` in all (what it has redeemed already is never
    /// taken back, and what is missing is credited), the payer gets the rest now.
    /// @param payeeSignature 65 bytes over `closeDigest(id, cumulative)` by the payee.
    function cooperativeClose(bytes32 id, uint96 cumulative, bytes calldata payeeSignature) external nonReentrant {
        Channel storage channel_ = _payersChannel(id);
        (address payee, uint96 claimed, uint96 deposit) = (channel_.payee, channel_.claimed, channel_.deposit);
        address actual = ECDSA.recoverCalldata(closeDigest(id, cumulative), payeeSignature);
        if (actual != payee) revert NotPayee(id, actual);
        if (cumulative > deposit) revert AboveDeposit(id, cumulative, deposit);
        if (cumulative > claimed) {
            _credit(payee, _advance(channel_, id, payee, claimed, cumulative));
            claimed = cumulative;
        }
        _close(id, deposit - claimed);
    }

    /// @notice Announces the close: the payee has `closeWindow` seconds to redeem, then the payer may `close`.
    function requestClose(bytes32 id) external {
        Channel storage channel_ = _payersChannel(id);
        if (channel_.closesAt != 0) revert AlreadyClosing(id, channel_.closesAt);
        uint40 closesAt = uint40(block.timestamp) + closeWindow;
        channel_.closesAt = closesAt;
        emit CloseRequested(id, closesAt);
    }

    /// @notice Closes for good and refunds the payer what was never claimed, once the close window or the channel's life is over.
    function close(bytes32 id) external nonReentrant {
        Channel storage channel_ = _payersChannel(id);
        (uint40 closesAt, uint40 expiresAt) = (channel_.closesAt, channel_.expiresAt);
        bool windowOver = closesAt != 0 && block.timestamp >= closesAt;
        if (!windowOver && block.timestamp < expiresAt) revert TooEarly(id, closesAt, expiresAt);
        _close(id, channel_.deposit - channel_.claimed);
    }

    // ------------------------------------------------------------------ views

    /// @notice The channel's state; all zero when it was never opened or is closed.
    function channel(bytes32 id) external view returns (Channel memory) {
        return _channels[id];
    }

    /// @notice The id of the channel that `payer` opens to `payee` as its `nonce`-th, counted from 0. Ids never recur: not on another
    /// chain, not in another deployment, not after a close.
    function channelId(address payer, address payee, uint256 nonce) public view returns (bytes32) {
        return keccak256(abi.encode(block.chainid, address(this), payer, payee, nonce));
    }

    /// @notice What a signer signs to owe `cumulative` base units in all.
    function voucherDigest(bytes32 id, uint96 cumulative) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(VOUCHER_TYPEHASH, id, cumulative)));
    }

    /// @notice What a payee signs to let the payer close at once with `cumulative` base units in all.
    function closeDigest(bytes32 id, uint96 cumulative) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(CLOSE_TYPEHASH, id, cumulative)));
    }

    // ------------------------------------------------------------------ private

    function _payersChannel(bytes32 id) private view returns (Channel storage channel_) {
        channel_ = _channels[id];
        address payer = channel_.payer;
        if (payer == address(0)) revert UnknownChannel(id);
        if (payer != msg.sender) revert NotPayer(id, msg.sender);
    }

    /// The same rules as `redeem`, in the same order; a broken one is returned as its error's selector instead of reverting.
    function _tryClaim(Claim calldata claim, bytes32 domain)
        private
        returns (address payee, uint96 amount, bytes4 reason)
    {
        (bytes32 id, uint96 cumulative) = (claim.id, claim.cumulative);
        Channel storage channel_ = _channels[id];
        (address signer, uint96 deposit) = (channel_.signer, channel_.deposit);
        if (signer == address(0)) return (payee, 0, UnknownChannel.selector);
        bytes32 structHash = keccak256(abi.encode(VOUCHER_TYPEHASH, id, cumulative));
        (address actual,,) =
            ECDSA.tryRecover(MessageHashUtils.toTypedDataHash(domain, structHash), claim.r, claim.vs);
        if (actual != signer) return (payee, 0, NotSigner.selector);
        if (cumulative > deposit) return (payee, 0, AboveDeposit.selector);
        uint96 claimed;
        (payee, claimed) = (channel_.payee, channel_.claimed);
        if (cumulative <= claimed) return (payee, 0, NothingToRedeem.selector);
        amount = _advance(channel_, id, payee, claimed, cumulative);
    }

    /// The caller has checked claimed < cumulative <= deposit.
    function _advance(Channel storage channel_, bytes32 id, address payee, uint96 claimed, uint96 cumulative)
        private
        returns (uint96 amount)
    {
        unchecked {
            amount = cumulative - claimed;
        }
        channel_.claimed = cumulative;
        emit Redeemed(id, payee, amount, cumulative);
    }

    /// Cannot wrap: every unit credited was deposited as a uint96, and 2^160 deposits do not happen.
    function _credit(address payee, uint256 amount) private {
        unchecked {
            credited[payee] += amount;
        }
    }

    function _close(bytes32 id, uint96 refund) private {
        delete _channels[id];
        emit Closed(id, refund);
        if (refund != 0) token.safeTransfer(msg.sender, refund);
    }
}
